"""Run directories of every kind, and a written page as its parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

_RESULT: dict[str, Any] = {
    "status": "finished",
    "steps": 40,
    "train_loss": 3.043062871694565,
    "eval_loss": 2.7549279005007636,
    "tokens": 25765,
    "supervised_tokens": 9906,
    "tokens_per_second": 219.6,
    "wall_seconds": 155.367,
    "peak_memory_bytes": 3844071424,
    "predicted_peak_bytes": None,
    "best_checkpoint": None,
}
_SPEC: dict[str, Any] = {
    "recipe": {
        "model": {"model_name_or_path": "some/model", "gguf_file": None},
        "tuning": {"method": "lora"},
        "objective": {"method": "sft"},
        "training": {"output_dir": "runs/my-run", "run_name": None},
    },
    "decisions": [{"key": "training.bf16", "value": True, "why": "this CPU computes it", "by": "ftune"}],
    "data_fingerprint": {"data/train.jsonl": "ab" * 32},
    "versions": {"torch": "2.9.0", "peft": "0.18"},
    "recipe_text": "model: {}\n",
    "device_type": "cpu",
    "ftune_version": "0.1.0",
    "seed": 7,
}
_VOID = {"meta", "br", "hr", "img", "link", "input"}


def _metric_lines(count: int, *, evaluated: bool = True) -> list[dict[str, Any]]:
    """Return that many lines of training metrics, and those of two evaluations."""
    memory = {"peak_memory_bytes": 3 * 2**30}
    lines = [
        {"step": 5 * n + 1, "loss": 4 - n / count, "learning_rate": 1e-3 / (n + 1), "grad_norm": 1 + n % 3, **memory}
        | {"tokens_per_second": 200.0 + n % 7, "tokens": 600 * n, "time": 1.5e9}
        for n in range(count)
    ]
    return [{"step": 0, "eval_loss": 4.5}, *lines, {"step": 5 * count, "eval_loss": 3.5}] if evaluated else lines


def _sample_lines(*whens: str, prompt: Any = "Say hello") -> list[dict[str, Any]]:
    return [{"step": n * 10, "when": when, "prompt": prompt, "answer": f"answer {n}"} for n, when in enumerate(whens)]


@pytest.fixture
def spec() -> dict[str, Any]:
    return _SPEC


@pytest.fixture
def result() -> dict[str, Any]:
    return _RESULT


@pytest.fixture
def metric_lines() -> Callable[..., list[dict[str, Any]]]:
    return _metric_lines


@pytest.fixture
def sample_lines() -> Callable[..., list[dict[str, Any]]]:
    return _sample_lines


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run directory; None leaves a file out, text is written as it is."""

    def make(**changed: Any) -> Path:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        files = {
            "run.json": _SPEC,
            "result.json": _RESULT,
            "metrics.jsonl": _metric_lines(8),
            "samples.jsonl": _sample_lines("before", "during", "after"),
            "recipe.yaml": "# a recipe\nmodel: {}\n",
            "environment.txt": "# Python 3.12\ntorch==2.9.0\n",
        }
        for name, content in {**files, **{key.replace("_", "."): value for key, value in changed.items()}}.items():
            if content is not None:
                (folder / name).write_text(_text(content), encoding="utf-8")
        return folder

    return make


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    rows = content if isinstance(content, list) else [content]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Page(HTMLParser):
    """A page in its parts; every element must be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: dict[str, str] = {}
        """The text in each element that has an id, in whatever it holds."""
        self.values: dict[str, str] = {}
        self.paths: dict[str, list[str]] = {}
        """The `d` of each path by the id of the group around it."""
        self.text = ""
        self.pieces: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in given.items()]
        if "id" in given:
            assert given["id"] not in self.ids, "an id stands for one element"
            self.ids[given["id"]] = ""
            self.values[given["id"]] = given.get("value", "")
        if tag == "path":
            self.paths.setdefault(self.open[-1][1], []).append(given["d"])
        if tag not in _VOID:
            self.open.append((tag, given.get("id", "")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.text += data
        self.pieces += [] if self.open and self.open[-1][0] == "style" else data.split()
        for _, name in self.open:
            if name:
                self.ids[name] += data

    def points(self, name: str) -> int:
        """Return how many points the first path of a group has."""
        return sum(self.paths[name][0].count(letter) for letter in "ML")

    def words(self) -> str:
        """Return what is read on the page, as one line."""
        return " ".join(self.pieces)


@pytest.fixture
def page() -> Callable[[Path], Page]:
    """Return a function that writes the report of a run and takes it apart."""
    from ftune import report

    return lambda directory: Page(report.write(directory))
