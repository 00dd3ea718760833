"""What `ftune launch` refuses before it starts anything, and what it prints and writes instead of starting."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from training_runs import recipe

from ftune.cli import launching
from ftune.errors import FtuneError, MachineError, RecipeError
from ftune.launch import Layout
from ftune.machine import Gpu, Machine
from ftune.ranks import network, watch

TWO_GPUS = Machine(gpus=(Gpu("NVIDIA A100", 80 * 2**30, (8, 0)),) * 2, cpu_cores=8)
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def path(tiny_model: Path, tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tiny_model, rows, tmp_path / "run")))
    return file


@pytest.mark.parametrize(
    ("layout", "gpus", "said"),
    [
        (Layout(0, on_cpu=True), None, "--gpus says how many"),
        (Layout(0), 0, "at least one process"),
        (Layout(2, nodes=2), 2, "have to meet somewhere"),
        (Layout(2, nodes=2, rendezvous="host"), 2, "have to meet somewhere"),
        (Layout(2, nodes=2, rendezvous="host:99999"), 2, "have to meet somewhere"),
        (Layout(2, nodes=2, node_rank=2, rendezvous="host:1"), 2, "no node 2 among 2"),
        (Layout(2, max_restarts=-1), 2, "cannot be negative"),
    ],
)
def test_words_that_make_no_launch(layout: Layout, gpus: int | None, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        launching.check_words(layout, gpus)


def test_a_batch_system_says_where_nodes_meet() -> None:
    launching.check_words(Layout(2, nodes=2), 2, scheduled=True)


def test_no_more_ranks_than_gpus() -> None:
    assert launching.laid_out(Layout(0), None, TWO_GPUS).ranks_per_node == 2
    with pytest.raises(MachineError, match="has 2 GPUs; set --gpus 2"):
        launching.laid_out(Layout(3), 3, TWO_GPUS)
    with pytest.raises(MachineError, match="has no GPUs; train on the processor"):
        launching.laid_out(Layout(0), None, replace(TWO_GPUS, gpus=()))
    assert launching.laid_out(Layout(3, on_cpu=True), 3, replace(TWO_GPUS, gpus=())).ranks == 3


def test_a_recipe_for_gpus_is_not_launched_on_processors(path: Path, ftune: Run) -> None:
    done = ftune("launch", path, "--cpu", "--gpus", "2", "--set", "training.fp16=true")
    assert done.returncode == 3
    assert "fp16 cannot run on a CPU" in done.stderr
    assert not (path.parent / "run").exists()


def test_what_is_written_without_a_start(path: Path, ftune: Run) -> None:
    done = ftune("launch", path, "--cpu", "--gpus", "2", "--no-start")
    assert done.returncode == 0, done.stderr
    assert (path.parent / "run" / "run.json").exists()


def test_a_dry_run_of_a_job_writes_nothing(path: Path, ftune: Run) -> None:
    done = ftune("launch", path, "--cpu", "--gpus", "2", "--nodes", "2", "--slurm", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2" in done.stdout
    assert done.stdout.splitlines()[-1] == f"sbatch {path.parent / 'run' / 'launch' / 'slurm.sh'}"
    assert not (path.parent / "run").exists()


def test_without_sbatch_nothing_is_left_behind(path: Path, ftune: Run) -> None:
    done = ftune("launch", path, "--cpu", "--gpus", "2", "--slurm", env={"PATH": str(path.parent)})
    assert done.returncode == 3
    assert "there is no sbatch here" in done.stderr
    assert not (path.parent / "run").exists()


def test_what_sbatch_refuses_is_told(path: Path, ftune: Run) -> None:
    program = path.parent / "sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpux' >&2\nexit 1\n")
    program.chmod(0o755)
    done = ftune("launch", path, "--cpu", "--gpus", "2", "--slurm", env={"PATH": f"{path.parent}:/usr/bin:/bin"})
    assert done.returncode == 3
    assert "invalid partition specified: gpux" in done.stderr
    assert f"sbatch {path.parent / 'run'}" in done.stderr


def test_a_job_is_decided_for_the_gpu_of_its_nodes() -> None:
    machine = launching.machine_of(Layout(8), "a100-80gb")
    assert len(machine.gpus) == 8
    assert machine.gpus[0].capability == (8, 0)
    assert machine.computes_bfloat16()
    with pytest.raises(RecipeError, match="a1000000"):
        launching.machine_of(Layout(8), "a1000000")


class TestManifest:
    def test_it_is_written(self, path: Path, ftune: Run) -> None:
        words = ("--gpus", "2", "--nodes", "2", "--kubernetes", "--image", "i:1", "--volume", "claim:/runs")
        done = ftune("launch", path, *words, "--set", "training.output_dir=/runs/x", "--dry-run")
        assert done.returncode == 0, done.stderr
        assert "kubectl apply -f ftune-x.yaml" in done.stdout
        manifest = done.stdout.partition("\n")[2].partition("# then:")[0]
        assert [each["kind"] for each in yaml.safe_load_all(manifest)] == ["ConfigMap", "PyTorchJob"]

    @pytest.mark.parametrize(
        ("more", "code", "said"),
        [
            ((), 2, "needs the image"),
            (("--image", "i:1", "--volume", "claim"), 2, "needs the image"),
            (("--image", "i:1", "--volume", "claim:/runs"), 5, "not on the volume that the pods share"),
        ],
    )
    def test_what_it_needs(self, more: tuple[str, ...], code: int, said: str, path: Path, ftune: Run) -> None:
        done = ftune("launch", path, "--gpus", "2", "--kubernetes", *more)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr


class TestNetwork:
    def test_a_port_that_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = f"127.0.0.1:{server.getsockname()[1]}"
            with pytest.raises(MachineError, match="cannot listen"):
                network.check_port(place)
            network.wait_for(place, 1)
        network.check_port(place)

    def test_nobody_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(MachineError, match="reached nobody"):
            network.wait_for(place, 0.1)

    def test_the_way_to_this_very_host(self) -> None:
        assert network.toward("127.0.0.1:29400") == network.loopback()

    def test_a_name_that_leads_nowhere(self) -> None:
        with pytest.raises(FtuneError, match="has no way to"):
            network.toward("no-such-host.invalid:29400")


def test_a_pod_that_is_numbered_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    watch.forget_rank()
    import os

    assert "RANK" not in os.environ
    assert "WORLD_SIZE" not in os.environ


def test_a_dry_run_names_the_other_nodes(path: Path, ftune: Run) -> None:
    words = ("--cpu", "--gpus", "1", "--nodes", "2", "--rendezvous", "127.0.0.1:29400")
    done = ftune("launch", path, *words, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout.splitlines()[-1])[-4:] == ["--node-rank", "1", "--rendezvous", "127.0.0.1:29400"]
