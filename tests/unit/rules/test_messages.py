"""`ftune explain` knows every name that an error may show."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftune.errors import RecipeError
from ftune.findings import known_findings
from ftune.rules import RULES
from ftune.rules.explanations import explain_name, overview
from ftune.rules.messages import MESSAGES

_SOURCE = Path(__file__).parents[3] / "ftune"


def names_in(text: str) -> Iterator[str]:
    """Give the names of all problems that a module makes."""
    for call in ast.walk(ast.parse(text)):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Problem":
            rules = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "rule")]
            yield from (
                node.value
                for rule in rules
                for node in ast.walk(rule)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            )
    yield from re.findall(r'yield "(data-\w+)",', text)


@pytest.mark.parametrize("kind", known_findings())
def test_every_finding_is_explained(kind: str) -> None:
    assert known_findings()[kind].fix in explain_name(kind)
    assert kind in overview()


def test_every_name_of_the_source_is_explained() -> None:
    found = {name for path in _SOURCE.rglob("*.py") for name in names_in(path.read_text(encoding="utf-8"))}
    assert len(found) > 60
    assert found - {rule.id for rule in RULES} == set(MESSAGES)
    for name in found:
        assert name in explain_name(name)
        assert name in overview()


_KNOWN = (
    *("lora.r", "tuning.r", "tuning.lora.r", "tuning.lora", "objective.sft", "optim.sgd", "training.optim"),
    *("optim_args.betas", "training.optim_args.betas", "adamw_8bit.betas", "data.format", "data.format.text"),
    *("cosine.num_cycles", "training.lr_scheduler_type.cosine"),
)
_STRANGE = ("nonsense.lora", "model.sft", "model.r", "sgd.betas", "r.lora", "x.one-precision", ".")


@pytest.mark.parametrize("name", _KNOWN)
def test_a_name_behind_what_it_belongs_to(name: str) -> None:
    assert name.rpartition(".")[2] in explain_name(name)


@pytest.mark.parametrize("name", _STRANGE)
def test_a_name_behind_something_else(name: str) -> None:
    with pytest.raises(RecipeError):
        explain_name(name)


def test_a_name_that_is_nearly_one() -> None:
    with pytest.raises(RecipeError, match="unreadable-row"):
        explain_name("unreadable-rows")
