"""Two nodes for real: two network namespaces joined by a cable, and SLURM with two nodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launches import PATIENCE_SECONDS, ROOT, Launch, written
from training_runs import losses, recipe, rows_file, weights

import ftune
from ftune.training import checkpoint

pytestmark = pytest.mark.slow

MEETING = "10.77.0.1:29471"
MINUTE = 60.0
SETTINGS = {"optim": "sgd", "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}


@pytest.fixture
def values(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    return recipe(tiny_model, rows_file(tmp_path / "rows.jsonl", 80), tmp_path / "run", training=SETTINGS)


def equals_one_process(values: dict[str, Any], run: Path, folder: Path) -> None:
    """Hold a run of two ranks against one process of twice the batch."""
    training = {**values["training"], "per_device_train_batch_size": 4, "output_dir": str(folder / "alone")}
    alone = ftune.train({**values, "training": training})
    assert losses(run) == pytest.approx(losses(alone.directory), rel=1e-5)
    for name, weight in weights(alone.directory).items():
        assert weights(run)[name].allclose(weight, rtol=1e-5, atol=1e-6), name


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def cable() -> Iterator[Callable[[], None]]:
    """Join the namespaces fta (10.77.0.1) and ftb (10.77.0.2), and return a function that cuts them apart."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (iproute2)")
    if ip("netns", "add", "fta").returncode != 0:
        pytest.skip("this system makes no network namespaces")
    try:
        assert ip("netns", "add", "ftb").returncode == 0
        assert (
            ip("link", "add", "va", "netns", "fta", "type", "veth", "peer", "name", "vb", "netns", "ftb").returncode
            == 0
        )
        for space, device, address in (("fta", "va", "10.77.0.1/24"), ("ftb", "vb", "10.77.0.2/24")):
            for words in (f"addr add {address} dev {device}", f"link set {device} up", "link set lo up"):
                done = ip("-n", space, *words.split())
                assert done.returncode == 0, done.stderr
        yield lambda: ip("-n", "fta", "link", "set", "va", "down") and None
    finally:
        ip("netns", "del", "fta")
        ip("netns", "del", "ftb")


@pytest.fixture
def on_node(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    """Return a function that runs `ftune WORDS` in a namespace."""
    begun: list[Launch] = []

    def start(space: str, *words: str) -> Launch:
        inside = ["ip", "netns", "exec", space]
        more = ("--gpus", "1", "--cpu", "--nodes", "2", "--rendezvous", MEETING)
        begun.append(Launch([*words, *more], tmp_path / f"{space}-{len(begun)}.txt", before=inside))
        return begun[-1]

    yield start
    for one in begun:
        one.clear()


def test_two_nodes_learn_what_one_process_learns(
    cable: Callable[[], None], on_node: Callable[..., Launch], values: dict[str, Any], tmp_path: Path
) -> None:
    path = str(written(tmp_path, values))
    first = on_node("fta", "launch", path)
    second = on_node("ftb", "launch", path, "--node-rank", "1")
    assert first.end() == 0, first.text() + second.text()
    assert second.end() == 0, second.text()
    assert "(node 0)" in first.text() + second.text()
    assert "(node 1)" in first.text() + second.text()
    assert "clocks within" in first.text() + second.text()
    assert (first.left_over(), second.left_over()) == ([], [])
    equals_one_process(values, tmp_path / "run", tmp_path)


def test_a_node_is_cut_off(
    cable: Callable[[], None], on_node: Callable[..., Launch], values: dict[str, Any], tmp_path: Path
) -> None:
    values["training"]["num_train_epochs"] = 500
    path, run = str(written(tmp_path, values)), tmp_path / "run"
    first = on_node("fta", "launch", path)
    second = on_node("ftb", "launch", path, "--node-rank", "1")
    first.wait_for_step(run, 4)
    second.look()
    cable()
    began = time.monotonic()
    assert first.end(MINUTE) == 5, first.text()
    assert second.end(MINUTE - (time.monotonic() - began)) == 5, second.text()
    for one in (first, second):
        assert "cannot be reached any more" in one.text()
        assert "Traceback" not in one.text()
        assert one.left_over() == []
    assert "node 1" in first.text().rpartition("error: ")[2]
    assert {checkpoint.damage(folder) for folder in (run / "checkpoints").iterdir()} == {None}  # one or more
    assert json.loads((run / "result.json").read_text())["status"] == "failed"


def test_a_node_that_never_comes(
    cable: Callable[[], None], on_node: Callable[..., Launch], values: dict[str, Any], tmp_path: Path
) -> None:
    alone = on_node("fta", "launch", str(written(tmp_path, values)), "--join-timeout", "10")
    assert alone.end(MINUTE) == 3
    assert "did not meet" in alone.text()
    assert "Traceback" not in alone.text()
    assert alone.left_over() == []
    other = on_node("ftb", "resume", str(tmp_path / "run"), "--node-rank", "1", "--join-timeout", "5")
    assert other.end(MINUTE) == 3
    assert f"reached nobody at {MEETING} within 5 s" in other.text()


def test_a_directory_that_is_not_shared(
    cable: Callable[[], None], on_node: Callable[..., Launch], values: dict[str, Any], tmp_path: Path
) -> None:
    """Each node has an output_dir of its own, as on local disks of the same name."""
    path = str(written(tmp_path, values))
    first = on_node("fta", "launch", path)
    second = on_node(
        "ftb", "launch", path, "--set", f"training.output_dir={tmp_path / 'elsewhere'}", "--node-rank", "1"
    )
    assert first.end() == 5, first.text()
    assert second.end() == 5, second.text()
    assert "does not see the run directory" in first.text()
    assert "(node 1)" in first.text()
    assert "set training.output_dir to a folder that all nodes mount" in first.text()


SLURM_CONF = """\
ClusterName=ftune
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17000
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=60
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2
PartitionName=all Nodes=n[1-2] Default=YES OverSubscribe=FORCE:4 MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start SLURM with two nodes on this machine; return the environment in which its commands find it."""
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons are started as root")
    programs = {name: shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch")}
    if missing := [name for name, found in programs.items() if found is None]:
        pytest.skip(
            f"SLURM is not installed: no {', '.join(missing)} (apt install slurmctld slurmd slurm-client munge)"
        )
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    host = os.uname().nodename.partition(".")[0]
    (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, folder=folder))
    (folder / "munge").mkdir()
    socket = folder / "munge" / "socket"
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    commands = [
        [
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket}"),
            *(f"--pid-file={folder}/munge/pid", f"--seed-file={folder}/munge/seed", f"--log-file={folder}/munge/log"),
        ],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    daemons = []
    try:
        for command in commands:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            time.sleep(1)
        end = time.monotonic() + MINUTE
        while "n[1-2]" not in slurm_says(environment, "sinfo", "-h", "-t", "idle", "-o", "%N"):
            assert time.monotonic() < end, (folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.5)
        yield environment
        slurm_says(environment, "scancel", "--user=root")
        time.sleep(2)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def slurm_says(environment: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False).stdout


def test_slurm_trains_on_both_nodes_and_survives_a_requeue(
    slurm: dict[str, str], values: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    path = written(tmp_path, values)
    environment = {**slurm, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "ftune", "launch", str(path), "--slurm", "--nodes", "2", "--gpus", "1", "--cpu"]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    job = next(word.rstrip(";") for word in done.stdout.split("batch job ")[1].split())
    log = run / "launch" / f"slurm-{job}.log"

    def waited(ready: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not ready():
            text = log.read_text() if log.exists() else "no log"
            assert time.monotonic() < end, text + slurm_says(slurm, "scontrol", "show", "job", job)
            time.sleep(0.3)

    waited(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count('"loss"') >= 4)
    assert "n[1-2]" in slurm_says(slurm, "squeue", "-h", "-j", job, "-o", "%N")
    slurm_says(slurm, "scontrol", "requeue", job)
    waited(lambda: (run / "model").is_dir() and (run / "result.json").exists())
    waited(lambda: json.loads((run / "result.json").read_text())["status"] == "finished")
    text = log.read_text()
    assert "(node 0)" in text
    assert "(node 1)" in text
    assert "going on from checkpoint-" in text
    waited(lambda: "JobState=COMPLETED" in slurm_says(slurm, "scontrol", "show", "job", job))
    assert "Restarts=1" in slurm_says(slurm, "scontrol", "show", "job", job)
    equals_one_process(values, run, tmp_path)
