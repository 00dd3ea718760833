"""The sample kept with a model: every family has one, it survives saving, and it shows what was changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from template_families import FAMILIES, tokenizer_of
from transformers import AutoTokenizer

from ftune import rundir
from ftune.errors import RunError
from ftune.models import golden


def saved(folder: Path, name: str = "chatml", kind: str = "merged", *, plain: bool = False) -> Any:
    tokenizer = tokenizer_of(name, kind)
    tokenizer.save_pretrained(folder)
    golden.write(folder, tokenizer, plain=plain)
    return AutoTokenizer.from_pretrained(folder)


def sample(folder: Path) -> Any:
    return json.loads((folder / rundir.TEMPLATE_SAMPLE).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "kind"), [(name, family.kinds[-1]) for name, family in FAMILIES.items()])
def test_every_family_has_a_sample_that_survives_saving(name: str, kind: str, tmp_path: Path) -> None:
    golden.check(tmp_path, saved(tmp_path, name, kind))
    known, family = sample(tmp_path), FAMILIES[name]
    assert [message["role"] for message in known["messages"]].count("tool") == family.calls
    assert bool(known["tools"]) == family.calls
    for text, ids in zip(known["rendered"], known["input_ids"], strict=True):
        assert tokenizer_of(name, kind)(text)["input_ids"] == ids
    for key in ("rendered", "input_ids"):
        assert known[f"{key}_sha256"] == hashlib.sha256(json.dumps(known[key]).encode()).hexdigest()


def test_the_day_does_not_change_the_sample(tmp_path: Path) -> None:
    saved(tmp_path, "gptoss")
    assert all("Current date: 2025-01-31" in text for text in sample(tmp_path)["rendered"])


def test_a_changed_template_is_shown_where_it_differs(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_end|>\\n' }}\n{%- endfor", "<|im_end|>' }}\n{%- endfor"
    )
    with pytest.raises(RunError) as error:
        golden.check(tmp_path, tokenizer)
    problem = error.value.problems[0]
    assert problem.rule == "template-changed"
    text = sample(tmp_path)["rendered"][0]
    place = text.index("<|im_end|>\n") + len("<|im_end|>")
    assert f"at character {place} " in problem.why
    assert "chat_template.jinja" in problem.fix


def test_a_heading_of_answers_that_changed_is_shown_too(tmp_path: Path) -> None:
    """It is not part of the finished conversation, but of what generation is given."""
    tokenizer = saved(tmp_path)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- '<|im_start|>assistant\\n' }}", "{{- 'Go:' }}")
    with pytest.raises(RunError, match=r"the folder now has .*Go:"):
        golden.check(tmp_path, tokenizer)


@pytest.mark.parametrize("template", [None, "{{ raise_exception('never') }}"])
def test_a_template_that_is_gone_or_refuses(template: str | None, tmp_path: Path) -> None:
    tokenizer = saved(tmp_path)
    tokenizer.chat_template = template
    with pytest.raises(RunError, match="never" if template else "no chat template"):
        golden.check(tmp_path, tokenizer)


@pytest.mark.parametrize("plain", [True, False])
def test_a_changed_tokenizer_is_shown_by_its_first_token(plain: bool, tmp_path: Path) -> None:
    saved(tmp_path, plain=plain)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["model"]["merges"][len(content["model"]["merges"]) // 10 :]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunError, match=r"the text is the same, but token \d+ was \d+ and is \d+"):
        golden.check(tmp_path, AutoTokenizer.from_pretrained(tmp_path))


def test_plain_text_is_marked_and_asks_for_no_template(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, plain=True)
    assert golden.reads_plain_text(tmp_path)
    tokenizer.chat_template = None
    golden.check(tmp_path, tokenizer)
    assert not golden.reads_plain_text(tmp_path / "elsewhere")


def test_a_sample_that_was_edited_is_refused(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path)
    known = sample(tmp_path)
    known["rendered"][0] += "x"
    (tmp_path / rundir.TEMPLATE_SAMPLE).write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(RunError, match="does not have the hash"):
        golden.check(tmp_path, tokenizer)


def test_a_template_that_takes_no_conversation_leaves_no_sample(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path)
    (tmp_path / rundir.TEMPLATE_SAMPLE).unlink()
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    golden.write(tmp_path, tokenizer, plain=False)
    assert not (tmp_path / rundir.TEMPLATE_SAMPLE).exists()
    golden.check(tmp_path, tokenizer)
