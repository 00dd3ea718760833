"""Who hangs and who only works slowly, told of real processes and of samples."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftune.ranks import place
from ftune.ranks.pulse import Observer, Sample, hung

LIMIT = 30.0


def sample(rank: int, idle: float, *, waits: bool, stopped: bool = False) -> Sample:
    return Sample(rank, "host", idle, waits, stopped, "somewhere")


def judged(*samples: Sample, ranks: int | None = None, limit: float = LIMIT) -> list[int]:
    found = hung({each.rank: each for each in samples}, ranks or len(samples), limit)
    return [each.rank for each in found]


class TestJudgement:
    def test_a_rank_that_sleeps_while_another_waits(self) -> None:
        assert judged(sample(0, 40, waits=True), sample(1, 40, waits=False)) == [1]

    def test_on_a_gpu_those_that_wait_are_busy(self) -> None:
        assert judged(sample(0, 0, waits=True), sample(1, 40, waits=False)) == [1]

    def test_a_stopped_rank_though_it_stopped_where_ranks_wait(self) -> None:
        assert judged(sample(0, 40, waits=True), sample(1, 40, waits=False, stopped=True)) == [1]

    def test_a_rank_that_writes_while_the_others_wait_for_an_hour(self) -> None:
        assert judged(sample(0, 3600, waits=True), sample(1, 0, waits=False)) == []

    def test_all_ranks_wait_for_each_other(self) -> None:
        assert judged(sample(0, 31, waits=True), sample(1, 40, waits=True)) == [0, 1]

    def test_not_yet(self) -> None:
        assert judged(sample(0, 29, waits=True), sample(1, 29, waits=False)) == []
        assert judged(sample(0, 29, waits=True), sample(1, 40, waits=True)) == []

    def test_nobody_waits_for_the_one_that_sleeps(self) -> None:
        """As while rows are downloaded, before there is a process group."""
        assert judged(sample(0, 40, waits=False), sample(1, 40, waits=False)) == []

    def test_a_rank_that_was_not_heard_of_may_be_at_work(self) -> None:
        assert judged(sample(0, 40, waits=True), sample(1, 40, waits=False), ranks=3) == []

    def test_zero_turns_it_off(self) -> None:
        assert judged(sample(0, 40, waits=True), sample(1, 40, waits=False), limit=0) == []


PROGRAMS = {
    "sleeps": "import time; time.sleep(60)",
    "computes": "while True: pass",
    "writes": "import time, os\nwhile True: os.write(1, b'x' * 100000); time.sleep(0.2)",
}


@pytest.mark.parametrize(("name", "idle"), [("sleeps", True), ("computes", False), ("writes", False)])
def test_what_a_process_does_is_seen_from_outside(name: str, idle: bool, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAMS[name]], stdout=subprocess.DEVNULL)
    try:
        (tmp_path / f"{process.pid}.json").write_text(
            f'{{"rank": 3, "time": {time.monotonic()}, "waits": true, "where": "f"}}'
        )
        observer = Observer("host", tmp_path)
        time.sleep(0.5)  # the interpreter has started
        observer.look([process.pid])
        time.sleep(1.0)
        (found,) = observer.look([process.pid])
        assert (found.rank, found.waits, found.stopped) == (3, True, False)
        assert (found.idle_seconds > 0.9) is idle
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        (found,) = observer.look([process.pid])
        assert (found.waits, found.stopped) == (False, True)
    finally:
        process.kill()
        process.wait()
    assert observer.look([process.pid]) == []


def test_where_a_thread_is_told_from_its_stack() -> None:
    def of_here() -> tuple[bool, str]:
        return place.looked_at(sys._getframe())

    waits, where = of_here()
    assert not waits
    assert where.startswith("of_here (ranks/test_pulse.py:")
    code = compile("def wait(get): return get()", "/lib/torch/distributed/distributed_c10d.py", "exec")
    names: dict[str, object] = {}
    exec(code, names)
    assert names["wait"](of_here)[0]
    names["_engine_run_backward"] = eval("lambda get: get()")
    code = compile("def _engine_run_backward(get): return get()", "/lib/torch/autograd/graph.py", "exec")
    exec(code, names)
    assert names["_engine_run_backward"](of_here)[0]
