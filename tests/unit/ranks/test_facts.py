"""What is said of hosts that differ: each message names the host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftune.errors import MachineError, RunError
from ftune.ranks.facts import Facts, problems, raise_errors, summary

FIRST = Facts(0, "alpha", "3.12.1", {"torch": "2.13.0"}, "run", "recipe", {"rows.jsonl": "d1"}, 8, 2**40, True, 0.0)
SECOND = replace(FIRST, rank=1, host="beta")
DATA = {"rows.jsonl": "d1"}

DIFFERENCES = {
    "versions-differ": replace(SECOND, versions={"torch": "2.12.0"}),
    "recipe-differs": replace(SECOND, run_digest="other"),
    "data-differ": replace(SECOND, data={"rows.jsonl": "d2"}),
    "output-not-shared": replace(SECOND, sees_mark=False),
    "disk-room": replace(SECOND, free_bytes=1000),
    "clock-differs": replace(SECOND, clock_seconds=-61.0),
}


def test_like_hosts_have_nothing_to_mend() -> None:
    assert problems([FIRST, SECOND], "/runs/x", DATA) == []


@pytest.mark.parametrize("rule", DIFFERENCES)
def test_each_difference_names_its_host(rule: str) -> None:
    (problem,) = problems([FIRST, DIFFERENCES[rule]], "/runs/x", DATA)
    assert problem.rule == rule
    assert "beta" in problem.what
    assert problem.fix


def test_another_recipe_on_one_disk() -> None:
    (problem,) = problems([FIRST, replace(SECOND, recipe_digest="other")], "/runs/x", DATA)
    assert problem.rule == "recipe-differs"
    assert problems([FIRST, replace(SECOND, recipe_digest="")], "/runs/x", DATA) == []


def test_a_host_is_told_of_once() -> None:
    several = [FIRST, *(replace(DIFFERENCES["versions-differ"], rank=rank) for rank in (1, 2, 3))]
    assert len(problems(several, "/runs/x", DATA)) == 1


def test_a_missing_data_file_is_another_one() -> None:
    (problem,) = problems([FIRST, SECOND], "/runs/x", {"rows.jsonl": "d1"} | {}) or [None]
    assert problem is None
    gone = replace(SECOND, data={"rows.jsonl": ""})
    assert [each.rule for each in problems([FIRST, gone], "/runs/x", DATA)] == ["data-differ"]


def test_what_is_raised_says_whether_it_is_the_run_or_the_machine() -> None:
    found = problems([FIRST, DIFFERENCES["output-not-shared"]], "/runs/x", DATA)
    with pytest.raises(RunError):
        raise_errors(found, print)
    found += problems([FIRST, DIFFERENCES["versions-differ"]], "/runs/x", DATA)
    with pytest.raises(MachineError) as raised:
        raise_errors(found, print)
    assert len(raised.value.problems) == 2


def test_clocks_are_warned_of_and_stop_nothing() -> None:
    said = []
    raise_errors(problems([FIRST, DIFFERENCES["clock-differs"]], "/runs/x", DATA), said.append)
    assert [problem.severity for problem in said] == ["warning"]


def test_the_summary_has_the_rate_of_the_network() -> None:
    text = summary([FIRST, SECOND], 2.5 * 2**30)
    assert "2 ranks on alpha, beta" in text
    assert "2.5 GiB/s" in text
    assert "clocks within 0.00 s" in text
    assert "all-reduce" not in summary([FIRST], None)
