"""What is looked at before the first step: hosts that differ, a directory that is not shared, the network.

The ranks tell each other through the store that started them, before there is a process group whose watchdog could end
a rank that tokenises. The group that measures the network is gone again when this returns.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from ftune import __version__, rundir
from ftune.digest import sha256_of
from ftune.errors import FtuneError, MachineError, Problem
from ftune.launch.plan import RECIPE_DIGEST
from ftune.machine import Machine
from ftune.ranks import facts, records
from ftune.resolve.files import fingerprint
from ftune.resolve.spec import RunSpec

_MEETING_SECONDS = 60
_kept: list[Any] = []
"""The store: the first rank holds it for all, who may still read when that one is done here."""
_PASSES = 3
_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Of the tensor that is added up: large enough that the network's rate counts, and not its latency."""


def check(directory: Path, machine: Machine, warn: Callable[[Problem], None]) -> str:
    """Return a line on what was found; raises RunError or MachineError naming the hosts that are not as they should be.

    Every rank calls it.
    """
    store, rank, ranks = next(iter(distributed.rendezvous("env://", timeout=timedelta(seconds=_MEETING_SECONDS))))
    _kept.append(store)
    mine = distributed.PrefixStore("ftune/preflight", store)
    mark = _mark(directory, mine, rank)
    clock = _clock(mine, rank, ranks)
    own = replace(_facts(directory, machine, mark), clock_seconds=clock)
    found = _told(mine, own, rank, ranks)
    facts.raise_errors(facts.problems(found, str(directory), _digests(directory)), warn if rank == 0 else _silent)
    rate = _bandwidth(distributed.PrefixStore("ftune/bandwidth", store), rank, ranks, machine) if ranks > 1 else None
    if rank == 0:
        (directory / rundir.LAUNCH / mark).unlink(missing_ok=True)
    return facts.summary(found, rate)


def _silent(_: Problem) -> None:
    pass


def _mark(directory: Path, store: Any, rank: int) -> str:
    """Return the name of a file that the first rank has written, for the others to look for."""
    if rank == 0:
        name = f".seen-{time.time_ns()}"
        (directory / rundir.LAUNCH).mkdir(parents=True, exist_ok=True)
        (directory / rundir.LAUNCH / name).touch()
        store.set("mark", name)
    return str(store.get("mark"), "ascii")


def _clock(store: Any, rank: int, ranks: int) -> float:
    """Return how far this clock is ahead of the first rank's, which tells its time once all have come.

    Raises MachineError where some do not.
    """
    store.set(f"here/{rank}", "")
    if rank != 0:
        return time.time() - float(store.get("clock"))
    keys = [f"here/{number}" for number in range(ranks)]
    try:
        store.wait(keys, timedelta(seconds=_MEETING_SECONDS))
    except distributed.DistStoreError:
        missing = ", ".join(str(number) for number, key in enumerate(keys) if not store.check([key]))
        what = f"rank {missing} did not come to the preflight within {_MEETING_SECONDS} s"
        fix = "look at what that node says; a disk or a network that is very slow does so too"
        raise MachineError(Problem("rank-missing", what, fix=fix)) from None
    store.set("clock", str(time.time()))
    return 0.0


def _facts(directory: Path, machine: Machine, mark: str) -> facts.Facts:
    spec = _spec(directory)
    names = sorted(spec.versions) if spec is not None else []
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    return facts.Facts(
        rank=int(os.environ["RANK"]),
        host=records.host(),
        python=platform.python_version(),
        versions={"ftune": __version__, **{name: machine.packages.get(name, "missing") for name in names}},
        run_digest=sha256_of(directory / rundir.RUN) if spec is not None else "",
        recipe_digest=os.environ.get(RECIPE_DIGEST, ""),
        data=fingerprint(list(spec.data_fingerprint)) if spec is not None and first_here else {},
        devices=len(machine.gpus),
        free_bytes=shutil.disk_usage(directory).free if directory.is_dir() else 0,
        sees_mark=_seen(directory / rundir.LAUNCH / mark),
        clock_seconds=0.0,
    )


def _seen(path: Path) -> bool:
    """Look more than once: a network's disk tells other hosts of a new file some seconds later."""
    for _ in range(20):
        if path.exists():
            return True
        time.sleep(0.5)
    return False


def _spec(directory: Path) -> RunSpec | None:
    try:
        return RunSpec.from_json((directory / rundir.RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, FtuneError):
        return None


def _digests(directory: Path) -> dict[str, str]:
    spec = _spec(directory)
    return spec.data_fingerprint if spec is not None else {}


def _told(store: Any, own: facts.Facts, rank: int, ranks: int) -> list[facts.Facts]:
    """Return what every rank found, by rank."""
    store.set(f"facts/{rank}", json.dumps(asdict(own)))
    return [facts.Facts(**json.loads(store.get(f"facts/{number}"))) for number in range(ranks)]


def _bandwidth(store: Any, rank: int, ranks: int, machine: Machine) -> float:
    """Return the bytes per second at which a tensor is added up over all ranks; its own group is gone afterwards."""
    kind = machine.device_type
    limit = timedelta(seconds=_MEETING_SECONDS)
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=ranks, timeout=limit
    )
    tensor: Any = None
    try:
        tensor = torch.ones(_BYTES[kind] // 4, device=device)
        distributed.all_reduce(tensor)
        if not bool((tensor == ranks).all()):
            what = f"adding up ones over {ranks} ranks gave {tensor.min().item():g} to {tensor.max().item():g}"
            raise MachineError(Problem("all-reduce-wrong", what, fix="look at the network and at its drivers"))
        began = time.perf_counter()
        for _ in range(_PASSES):
            distributed.all_reduce(tensor)
        float(tensor[0])  # waits for the device
        return _PASSES * _BYTES[kind] / (time.perf_counter() - began)
    finally:
        distributed.destroy_process_group()
        if kind == "cuda":  # what was taken for this is neither kept nor counted
            tensor = None
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
