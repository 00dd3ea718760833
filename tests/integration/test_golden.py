"""A run keeps a rendered sample with its model; chat and merge refuse a template or tokenizer changed since."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import recipe, rows_file

import ftune
from ftune import chat, export, rundir
from ftune.errors import RunError

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with an adapter; copy it before changing it."""
    home = tmp_path_factory.mktemp("golden")
    rows = rows_file(home / "rows.jsonl", 8)
    settings = recipe(tiny_model, rows, home / "run", tuning={"method": "lora", "r": 2}, training={"max_steps": 1})
    return Path(ftune.train(settings).directory)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def edit_template(model: Path) -> None:
    path = model / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    assert "<|im_end|>\n" in text or "<|im_end|>\\n" in text
    path.write_text(text.replace("<|im_end|>", "<|im_end|> "), encoding="utf-8")


def edit_tokenizer(model: Path) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    path.write_text(json.dumps(content), encoding="utf-8")


def test_an_untouched_run_is_opened_and_merged(run: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    chat.open_target(str(run))
    export.merge(run, merged)
    kept = [(folder / rundir.TEMPLATE_SAMPLE).read_text(encoding="utf-8") for folder in (run / rundir.MODEL, merged)]
    assert kept[0] == kept[1]
    chat.open_target(str(merged))


@pytest.mark.parametrize(("edit", "why"), [(edit_template, "at character"), (edit_tokenizer, "token")])
def test_what_was_changed_since_is_refused(edit: Callable[[Path], None], why: str, run: Path, tmp_path: Path) -> None:
    edit(run / rundir.MODEL)
    acts: list[Callable[[], Any]] = [
        lambda: chat.open_target(str(run)),
        lambda: chat.open_target(str(run / rundir.MODEL)),
        lambda: export.merge(run, tmp_path / "merged"),
    ]
    for act in acts:
        with pytest.raises(RunError) as error:
            act()
        problem = error.value.problems[0]
        assert problem.rule == "template-changed"
        assert why in problem.why
    assert not (tmp_path / "merged").exists()


def test_a_merged_folder_that_was_changed_is_refused(run: Path, tmp_path: Path) -> None:
    export.merge(run, tmp_path / "merged")
    edit_template(tmp_path / "merged")
    with pytest.raises(RunError, match="is not the one the model was trained with"):
        chat.open_target(str(tmp_path / "merged"))


def test_a_user_sees_what_to_do(run: Path, ftune: Callable[..., Any]) -> None:
    edit_template(run / rundir.MODEL)
    said = ftune("chat", run, "--prompt", "Hello")
    assert said.returncode == 5
    assert "chat_template.jinja" in said.stderr
    assert "Traceback" not in said.stderr


def test_plain_text_is_marked_and_never_templated(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"a line of text {at}"}) + "\n" for at in range(8)), encoding="utf-8")
    settings = recipe(tiny_model, rows, tmp_path / "run", objective={"method": "pretrain"}, training={"max_steps": 1})
    folder = Path(ftune.train(settings).directory) / rundir.MODEL
    assert json.loads((folder / rundir.TEMPLATE_SAMPLE).read_text(encoding="utf-8"))["templated"] is False
    _, tokenizer = chat.open_target(str(shutil.copytree(folder, tmp_path / "given away")))
    assert tokenizer.chat_template is None
