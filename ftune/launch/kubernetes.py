"""The manifest with which Kubeflow starts a launch: a PyTorchJob whose pods are the nodes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftune import rundir
from ftune.launch.plan import LaunchPlan, Layout, option_words

_RECIPE_FOLDER = "/etc/ftune"


def kubernetes_plan(
    directory: Path,
    layout: Layout,
    *,
    recipe: str,
    overrides: Sequence[str],
    image: str,
    volume: tuple[str, str],
    output: Path,
) -> LaunchPlan:
    """Return the manifest of a run, with its recipe in it, and the command that hands it over.

    `directory` is the run directory as the pods see it, on a volume that all of them mount: (claim, mount path).
    """
    name = re.sub(r"[^a-z0-9-]+", "-", directory.name.lower()).strip("-")[:40].strip("-") or "run"
    name = f"ftune-{name}"
    objects = [_recipe(name, recipe), _job(name, directory, layout, overrides, image, volume)]
    note = f"follow it with: kubectl logs -f {name}-master-0"
    return LaunchPlan(("kubectl", "apply", "-f", str(output)), files={str(output): as_yaml(objects)}, note=note)


def as_yaml(objects: Sequence[Any]) -> str:
    """Return objects as the documents of one YAML file."""
    import yaml

    return yaml.safe_dump_all(objects, sort_keys=False, width=120)


def _recipe(name: str, text: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"recipe.yaml": text},
    }


def _job(
    name: str, directory: Path, layout: Layout, overrides: Sequence[str], image: str, volume: tuple[str, str]
) -> dict[str, Any]:
    claim, mount = volume
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for a container of this name
        "image": image,
        "command": ["sh", "-c", _script(directory, layout, overrides)],
        "volumeMounts": [
            {"name": "recipe", "mountPath": _RECIPE_FOLDER},
            {"name": "runs", "mountPath": mount},
            {"name": "memory", "mountPath": "/dev/shm"},
        ],
    }
    if not layout.on_cpu:
        container["resources"] = {"limits": {"nvidia.com/gpu": layout.ranks_per_node}}
    pod = {
        "spec": {
            "containers": [container],
            "terminationGracePeriodSeconds": 120,
            "volumes": [
                {"name": "recipe", "configMap": {"name": name}},
                {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
                # Loader workers and NCCL share memory, of which a pod has 64 MiB otherwise.
                {"name": "memory", "emptyDir": {"medium": "Memory"}},
            ],
        }
    }
    replicas = {"Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": pod}}
    if layout.nodes > 1:
        replicas["Worker"] = {"replicas": layout.nodes - 1, "restartPolicy": "OnFailure", "template": pod}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {"runPolicy": {"backoffLimit": layout.max_restarts}, "pytorchReplicaSpecs": replicas},
    }


def _script(directory: Path, layout: Layout, overrides: Sequence[str]) -> str:
    """Return what a pod does: the first one makes the run directory, and a pod that is started again goes on."""
    run = shlex.quote(str(directory))
    begin = shlex.join(["launch", f"{_RECIPE_FOLDER}/recipe.yaml", *option_words(overrides)])
    options = shlex.join(layout.options())
    # The operator numbers pods in RANK and tells them of the first one, itself as localhost.
    return (
        f"if [ -e {run}/{rundir.RUN} ]; then set -- resume {run}; else set -- {begin}; fi; "
        'if [ "$RANK" = 0 ]; then MASTER_ADDR=$(hostname -i | cut -d " " -f 1); fi; '
        f'exec ftune "$@" {options} --node-rank "$RANK" --rendezvous "$MASTER_ADDR:$MASTER_PORT"'
    )
