"""The page says what the files say, nothing in them becomes markup, and nothing is loaded."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ftune import report, rundir
from ftune.errors import RunError
from ftune.units import format_bytes, format_duration

EVIL = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}{% raw %}&amp;\"'"


def test_every_figure_equals_the_result(make_run: Any, page: Any) -> None:
    run = make_run()
    result = json.loads((run / "result.json").read_text())
    found = page(run)
    known = {name: value for name, value in result.items() if value is not None and name != "status"}
    assert {name for name in found.ids if name.startswith("figure-")} == {f"figure-{name}" for name in known}
    assert {name: json.loads(found.values[f"figure-{name}"]) for name in known} == known
    shown = {name: found.ids[f"figure-{name}"] for name in known}
    assert shown == {
        "steps": "40",
        "train_loss": "3.0431",
        "eval_loss": "2.7549",
        "tokens": "25,765",
        "supervised_tokens": "9,906",
        "tokens_per_second": "219.6",
        "wall_seconds": format_duration(155.367),
        "peak_memory_bytes": format_bytes(3844071424),
    }


def test_what_the_run_is_about(make_run: Any, page: Any) -> None:
    found = page(make_run(overrides_yaml='- "training.weight_decay=0.01"\n'))
    words = found.words()
    for text in ("my-run finished model some/model tuning lora objective sft seed 7", "ab" * 32, "data/train.jsonl"):
        assert text in words
    assert "training.bf16 true this CPU computes it ftune" in words
    assert "torch 2.9.0" in words
    assert found.ids["recipe"].removeprefix("\n") == "# a recipe\nmodel: {}\n"
    assert found.ids["overrides"].removeprefix("\n") == '- "training.weight_decay=0.01"\n'
    assert found.ids["environment"].removeprefix("\n") == "# Python 3.12\ntorch==2.9.0\n"
    assert "before, step 0 answer 0 during, step 10 answer 1 after, step 20 answer 2" in words


def test_headings_and_drawings_can_be_heard(make_run: Any, page: Any) -> None:
    found = page(make_run())
    levels = [int(tag[1]) for tag in found.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    labels = [value for _, name, value in found.attributes if name == "aria-label"]
    assert "Peak memory. 3.0 GiB at step 1, 3.0 GiB at step 36, between 3.0 GiB and 3.0 GiB." in labels
    assert ("html", "lang", "en") in found.attributes


def test_nothing_in_a_run_becomes_markup(make_run: Any, page: Any) -> None:
    spec = {
        "recipe": {
            "model": {"model_name_or_path": EVIL},
            "tuning": {"method": EVIL},
            "training": {"run_name": EVIL},
        },
        "decisions": [dict.fromkeys(("key", "value", "why", "by"), EVIL)],
        "data_fingerprint": {EVIL: EVIL},
        "versions": {EVIL: EVIL},
    }
    prompt = [{"role": EVIL, "content": EVIL}, {"role": "user", "content": EVIL}]
    files: dict[str, Any] = {
        "run_json": spec,
        "result_json": {"status": EVIL, "message": EVIL, EVIL: EVIL, "best_checkpoint": EVIL},
        "samples_jsonl": [{"step": EVIL, "when": EVIL, "prompt": prompt, "answer": EVIL}],
        "metrics_jsonl": [{"step": 1, "loss": 1.0, EVIL: EVIL}, {"step": EVIL, "loss": EVIL}],
        **dict.fromkeys(("recipe_yaml", "overrides_yaml", "environment_txt"), EVIL),
    }
    found = page(make_run(**files))
    assert {"script", "img"} & set(found.tags) == set()
    assert [name for _, name, _ in found.attributes if name.startswith("on")] == []
    assert found.text.count(EVIL) >= 18


def test_nothing_is_loaded_from_anywhere(make_run: Any, page: Any) -> None:
    found = page(make_run())
    assert re.search(r"https?://|@import|<script|<link|<iframe|javascript:", found.source) is None
    loading = [(name, value) for _, name, value in found.attributes if name in ("src", "href", "xlink:href", "action")]
    assert loading
    assert all(value.startswith("#") and value[1:] in found.ids for _, value in loading)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", found.source))
    policy = next(value for _, name, value in found.attributes if name == "content" and "-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_same_run_gives_the_same_bytes(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    first = report.write(run).read_bytes()
    assert report.write(run).read_bytes() == first
    monkeypatch.setenv("SECRET_TOKEN", "hf_do_not_tell")
    moved = run.rename(run.with_name("elsewhere"))
    assert report.write(moved).read_bytes() == first
    assert [path.name for path in moved.glob("*.partial")] == []


def test_many_answers_fold(make_run: Any, page: Any, sample_lines: Any) -> None:
    found = page(make_run(samples_jsonl=sample_lines("before", *["during"] * 9, "after")))
    words = found.words()
    assert "before, step 0 answer 0 during, step 50 answer 5 after, step 100 answer 10 8 more in between" in words
    assert all(words.count(f"answer {n} ") == 1 for n in range(11))


def test_prompts_stay_apart(make_run: Any, page: Any) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    rows = [
        {"step": step, "when": when, "prompt": prompt, "answer": f"{when} {prompt == turns}"}
        for step, when in ((0, "before"), (9, "after"))
        for prompt in (turns, "Plain text")
    ]
    words = page(make_run(samples_jsonl=rows)).words()
    assert "system Be brief. user Hello? before, step 0 before True after, step 9 after True" in words
    assert "Plain text before, step 0 before False after, step 9 after False" in words


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError) as caught:
            report.write(folder)
        assert caught.value.exit_code == 5
        assert caught.value.problems[0].fix
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_an_error(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir, "write_text", full)
    with pytest.raises(RunError, match="No space left on device"):
        report.write(make_run())
