"""What a launch would execute: words, environment and files, without executing any of it."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from ftune.launch import Interface, Layout, agent_plan, node_command
from ftune.launch.kubernetes import kubernetes_plan
from ftune.launch.slurm import slurm_plan

ODD = Path("/data/my runs/it's $HOME")
HERE = Interface("10.0.0.2", "eth1")


def options(words: tuple[str, ...]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)


def test_ranks_get_the_run_directory_and_no_recipe() -> None:
    plan = agent_plan(ODD, Layout(2), HERE, cpu_cores=8, ranks=["--plain"])
    assert plan.argv[-4:] == ("-m", "ftune.training", str(ODD), "--plain")
    assert options(plan.argv)["nproc-per-node"] == "2"
    assert options(plan.argv)["redirects"] == "1:3"
    assert plan.environment["OMP_NUM_THREADS"] == "4"
    assert not any("recipe" in word for word in plan.argv)


def test_torchrun_reads_every_option() -> None:
    """An option that torchrun does not know, or reads otherwise, would only show on a cluster."""
    from torch.distributed.run import config_from_args, parse_args

    layout = Layout(2, nodes=3, node_rank=1, rendezvous="10.0.0.1:29400", max_restarts=4, join_seconds=77)
    plan = agent_plan(ODD, layout, HERE, cpu_cores=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        config, _, words = config_from_args(parse_args(plan.argv[3:]))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (3, 3, 2, 4)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.local_addr) == ("c10d", "10.0.0.1:29400", "10.0.0.2")
    assert config.rdzv_configs["is_host"] == "0"
    assert config.rdzv_configs["join_timeout"] == "77"
    assert words == ["-u", "-m", "ftune.training", str(ODD)]


def test_the_nodes_agree_on_where_and_as_what_they_meet() -> None:
    first, second = (
        options(agent_plan(ODD, Layout(1, nodes=2, node_rank=rank, rendezvous="h:1"), HERE, cpu_cores=1).argv)
        for rank in (0, 1)
    )
    assert first.pop("rdzv-conf") != second.pop("rdzv-conf")
    assert first == second


def test_the_interface_is_named_for_both_libraries() -> None:
    two = agent_plan(ODD, Layout(1, nodes=2, rendezvous="h:1"), HERE, cpu_cores=1).environment
    assert (two["GLOO_SOCKET_IFNAME"], two["NCCL_SOCKET_IFNAME"]) == ("eth1", "eth1")
    processor = agent_plan(ODD, Layout(1, on_cpu=True), HERE, cpu_cores=1).environment
    assert processor["CUDA_VISIBLE_DEVICES"] == ""
    assert "NCCL_SOCKET_IFNAME" not in processor


def test_a_plan_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    plan = agent_plan(ODD, Layout(2, on_cpu=True), HERE, cpu_cores=2)
    shown = tmp_path / "show"
    shown.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$GLOO_SOCKET_IFNAME"\n')
    shown.chmod(0o755)
    line = plan.as_command().replace(shlex.quote(plan.argv[0]), str(shown), 1)
    printed = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == [*plan.argv[1:], "eth1"]


def test_options_that_were_not_given_are_not_handed_on() -> None:
    assert Layout(8).options() == ["--gpus", "8"]
    layout = Layout(2, 3, 0, "h:1", on_cpu=True, max_restarts=1, hang_seconds=90)
    assert layout.options() == shlex.split("--gpus 2 --nodes 3 --cpu --max-restarts 1 --hang-timeout 90")
    assert layout.ranks == 6


class TestSlurm:
    def text(self, layout: Layout, *more: str) -> str:
        (text,) = slurm_plan(ODD, layout, folder=Path("/home/me/it's here"), options=more).files.values()
        return text

    def test_bash_reads_it(self) -> None:
        done = subprocess.run(
            ["bash", "-n"], input=self.text(Layout(8, 2)), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def test_each_node_gets_the_words_of_a_node(self, tmp_path: Path) -> None:
        """Run by bash with programs of SLURM's names, which print what they are given."""
        for name, body in {
            "scontrol": 'case "$2" in hostnames) echo n1; echo n2;; node) echo "NodeAddr=10.1.2.3 Version=1";; esac',
            "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=1 exec "$@"',
        }.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        (tmp_path / "show").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / "show").chmod(0o755)
        layout = Layout(1, 2, on_cpu=True, max_restarts=3)
        words = node_command(ODD, layout, node_rank=1, rendezvous="10.1.2.3:20042")
        (text,) = slurm_plan(ODD, layout, folder=tmp_path).files.values()
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[1-2]"}
        text = text.replace(words[0], str(tmp_path / "show"))
        done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == words[1:]

    def test_options_of_the_user_go_before_those_of_ftune(self) -> None:
        text = self.text(Layout(8, 2), "partition=gpu", "--time=4:00:00", "signal=TERM@600", "exclusive")
        lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
        for line in ("partition=gpu", "time=4:00:00", "signal=TERM@600", "exclusive", "gpus-per-node=8", "nodes=2"):
            assert f"#SBATCH --{line}" in lines
        assert len([line for line in lines if "signal" in line]) == 1

    def test_a_job_on_the_processor_asks_for_no_gpus(self) -> None:
        assert "gpus-per-node" not in self.text(Layout(2, 2, on_cpu=True))


class TestKubernetes:
    def objects(self, layout: Layout, **more: object) -> list[dict[str, object]]:
        plan = kubernetes_plan(
            Path("/runs/My Run"),
            layout,
            recipe="model: {model_name_or_path: m}  # a # b\n",
            overrides=["training.run_name=it's mine"],
            image="ftune:1",
            volume=("shared", "/runs"),
            output=Path("x.yaml"),
        )
        assert plan.argv == ("kubectl", "apply", "-f", "x.yaml")
        return list(yaml.safe_load_all(plan.files["x.yaml"]))

    def test_the_recipe_is_in_it_as_it_was_written(self) -> None:
        recipe, job = self.objects(Layout(8, 3))
        assert recipe["data"] == {"recipe.yaml": "model: {model_name_or_path: m}  # a # b\n"}
        assert recipe["metadata"] == job["metadata"] == {"name": "ftune-my-run"}

    def test_a_pod_for_each_node(self) -> None:
        _, job = self.objects(Layout(8, 3, max_restarts=2))
        replicas = job["spec"]["pytorchReplicaSpecs"]
        assert {name: each["replicas"] for name, each in replicas.items()} == {"Master": 1, "Worker": 2}
        (container,) = replicas["Worker"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        assert job["spec"]["runPolicy"]["backoffLimit"] == 2
        assert "Worker" not in self.objects(Layout(8))[1]["spec"]["pytorchReplicaSpecs"]

    @pytest.mark.parametrize("begun", [False, True])
    def test_what_a_pod_says_to_ftune(self, begun: bool, tmp_path: Path) -> None:
        """Run by sh, with a program named ftune that prints what it is given."""
        _, job = self.objects(Layout(2, 2, on_cpu=True))
        (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        assert "resources" not in container
        run = tmp_path / "run"
        if begun:
            run.mkdir()
            (run / "run.json").touch()
        (tmp_path / "ftune").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / "ftune").chmod(0o755)
        shell, flag, script = container["command"]
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "23456"}
        done = subprocess.run(
            [shell, flag, script.replace("'/runs/My Run'", str(run))],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        first = ["launch", "/etc/ftune/recipe.yaml", "--set", "training.run_name=it's mine"]
        more = shlex.split("--gpus 2 --nodes 2 --cpu --node-rank 1 --rendezvous first:23456")
        script = script.replace("'/runs/My Run/run.json'", "")
        assert done.stdout.splitlines() == [*(["resume", str(run)] if begun else first), *more]
