"""What each rank knows of its host before the first step, and what is wrong where they differ. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ftune.errors import MachineError, Problem, RunError
from ftune.units import format_bytes, format_duration

CLOCK_SECONDS = 5.0
"""Farther apart, times in logs of several hosts no longer say what came first."""
LEAST_FREE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Facts:
    """What one rank found on its host."""

    rank: int
    host: str
    python: str
    versions: dict[str, str]
    """Of ftune and of the packages that train, by name."""
    run_digest: str
    """SHA-256 of the run.json that this rank read; empty where there is none."""
    recipe_digest: str
    """Of the recipe that its node was started with; empty where it was started with the run directory."""
    data: dict[str, str]
    """SHA-256 of each data file as this host sees it; empty but for the first rank of a host."""
    devices: int
    free_bytes: int
    sees_mark: bool
    """Whether what the first rank wrote into the run directory is there."""
    clock_seconds: float
    """How far this host's clock is ahead of the first rank's."""


def problems(found: Sequence[Facts], directory: str, data: dict[str, str]) -> list[Problem]:
    """Return what is wrong, each saying which host; `data` are the digests of run.json."""
    first = found[0]
    by_host = {fact.host: fact for fact in reversed(found)}
    said: list[Problem] = []
    for fact in by_host.values():
        if not fact.run_digest or not fact.sees_mark:
            what = f"{fact.host} does not see the run directory {directory} of {first.host}"
            why = "all ranks write one checkpoint, and all of them read it"
            fix = "set training.output_dir to a folder that all nodes mount (NFS, Lustre, a shared volume)"
            said.append(Problem("output-not-shared", what, why=why, fix=fix))
            continue
        said += _differing(fact, first)
        for name, digest in fact.data.items():
            if data.get(name) != digest:
                what = f"{name} is not the same file on {fact.host}"
                why = "its SHA-256 differs from that in run.json; each rank would learn from rows of its own"
                said.append(Problem("data-differ", what, why=why, fix="copy the file anew, or use a shared disk"))
        if fact.free_bytes < LEAST_FREE_BYTES:
            what = f"{fact.host} has {format_bytes(fact.free_bytes)} of disk left in {directory}"
            said.append(Problem("disk-room", what, fix="free the disk, or choose another training.output_dir"))
        if abs(fact.clock_seconds) > CLOCK_SECONDS:
            far = format_duration(abs(fact.clock_seconds))
            what = (
                f"the clock of {fact.host} is {far} {'ahead of' if fact.clock_seconds > 0 else 'behind'} {first.host}'s"
            )
            why = "times in the records of a failure would not tell which came first"
            said.append(Problem("clock-differs", what, why=why, fix="run NTP on all hosts", severity="warning"))
    return said


def _differing(fact: Facts, first: Facts) -> list[Problem]:
    said = []
    mine, others = {"Python": fact.python, **fact.versions}, {"Python": first.python, **first.versions}
    names = [name for name in sorted({*mine, *others}) if mine.get(name) != others.get(name)]
    if names:
        pairs = ", ".join(f"{name} {mine.get(name, 'missing')} and not {others.get(name, 'missing')}" for name in names)
        what, why = f"{fact.host} has other versions than {first.host}", pairs
        said.append(Problem("versions-differ", what, why=why, fix="install the same packages on all hosts"))
    if fact.run_digest != first.run_digest:
        what = f"{fact.host} reads another run.json than {first.host}"
        fix = "start all nodes on one run directory, on a disk that all of them mount"
        said.append(Problem("recipe-differs", what, why="the ranks would train different things", fix=fix))
    elif fact.recipe_digest and first.recipe_digest and fact.recipe_digest != first.recipe_digest:
        what = f"{fact.host} was started with another recipe, or other --set, than {first.host}"
        fix = "start all nodes with the same recipe"
        said.append(Problem("recipe-differs", what, why="the ranks would train different things", fix=fix))
    return said


def raise_errors(said: Sequence[Problem], warn: Callable[[Problem], None]) -> None:
    """Raise what cannot be trained with, all at once; tell the rest."""
    errors = [problem for problem in said if problem.severity == "error"]
    for problem in said:
        if problem.severity != "error":
            warn(problem)
    if errors:
        run = ("output-not-shared", "recipe-differs", "data-differ")
        raise (RunError if all(problem.rule in run for problem in errors) else MachineError)(*errors)


def summary(found: Sequence[Facts], bytes_per_second: float | None) -> str:
    """Return one line on what was checked."""
    hosts = list(dict.fromkeys(fact.host for fact in found))
    parts = [f"{len(found)} ranks on {', '.join(hosts)}"]
    if bytes_per_second is not None:
        parts.append(f"an all-reduce moves {format_bytes(bytes_per_second)}/s")
    parts.append(f"{format_bytes(min(fact.free_bytes for fact in found))} of disk free")
    if len(hosts) > 1:
        parts.append(f"clocks within {max(abs(fact.clock_seconds) for fact in found):.2f} s")
    return "preflight: " + "; ".join(parts)
