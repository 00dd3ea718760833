"""`ftune preview`, as a user runs it: every token, what is learned, and what is odd about all rows."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import template_families
from conftest import make_tokenizer
from tokenizers import decoders

from ftune import cli, plugin
from ftune.data.faults import Faults
from ftune.data.parts import Encoding
from ftune.data.rows import Row
from ftune.preview.shown import shown_row, token_texts
from ftune.preview.terminal import Printer

Preview = Callable[..., "Done"]

SECRET = "\x1b[31mred\x1b[0m \u202eback <script>alert(1)</script>"


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [
    chat("Capital of Peru?", "Lima,\nof course"),
    chat("Say it", "\u4f60\u597d caf\u00c3\u00a9"),
    chat(SECRET, "No"),
    chat("Capital of Peru?", "Lima,\nof course"),
    chat("Go on", "so " * 100),
    chat("Nothing", ""),
    *(chat(f"What is {number} times {number * 7}?", f"{number * number * 7}, since you ask") for number in range(20)),
]


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> Path:
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "recipe.yaml").write_text(
        f"model:\n  model_name_or_path: {tiny_model}\ndata:\n  train: train.jsonl\n  max_length: 120\n"
        "training:\n  output_dir: runs/x\n",
        encoding="utf-8",
    )
    return tmp_path


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def preview(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return a function that runs the command in this process; starting one costs seconds."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("FTUNE_CACHE", str(home / "cache"))

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["ftune", "preview", "recipe.yaml", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return Done(int(left.value.code or 0), said.out, said.err)

    return run


def test_every_token_and_what_is_learned_in_brackets(preview: Preview, home: Path) -> None:
    done = preview("--rows", "1")
    assert (done.returncode, done.stderr) == (0, "")
    border, blank, line = "\u00a6", "\u00b7", "\u21b5\n"
    learned = "Lima,\nof course".replace(" ", blank).replace("\n", line)
    tokens = border.join(re.findall(rf"{line}|[^\n]", learned))
    assert f"{border}[[{tokens}{border}<|im_end|>]]{border}" in done.stdout
    assert f"C{border}a{border}p{border}i" in done.stdout
    heading = re.search(r"train\.jsonl:1  (\d+) tokens, (\d+) learned$", done.stdout, re.MULTILINE)
    assert heading
    assert int(heading[2]) == len("Lima,\nof course") + 1
    assert done.stdout.count("[[") == 2  # the legend's too
    assert not (home / "runs").exists()
    assert [path.name for path in home.iterdir() if path.name not in ("cache", "recipe.yaml", "train.jsonl")] == []


def test_the_audit_counts_all_rows(preview: Preview, home: Path) -> None:
    done = preview("--rows", "0")
    assert done.returncode == 0
    assert "25 (messages), 1 left out" in done.stdout
    for kind, place in (("cut", 5), ("no-answer", 6), ("broken-text", 2), ("duplicate", 4)):
        found = re.search(rf"warning {kind}: 1 of \d+ rows .*\n.*\n.*\n +\S*train\.jsonl:{place}\b", done.stdout)
        assert found, (kind, done.stdout)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_row_cannot_write_to_the_terminal(ftune: Callable[..., Any], home: Path, encoding: str) -> None:
    settings = {"FTUNE_CACHE": str(home / "cache"), "PYTHONIOENCODING": encoding}
    done = ftune("preview", "recipe.yaml", "--rows", "4", cwd=home, env=settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout
    assert "\\x1b" in done.stdout
    assert done.stdout.isascii() == (encoding == "ascii")


def test_colour_is_for_terminals_that_want_it(home: Path) -> None:
    coloured = on_terminal(home)
    assert "\x1b[1;4;32mL\x1b[0m" in coloured
    assert "[[" not in coloured
    for plain in (on_terminal(home, NO_COLOR="1"), on_terminal(home, TERM="dumb")):
        assert "\x1b[" not in plain
        assert "[[L" in plain


def on_terminal(home: Path, **environment: str) -> str:
    """Return what the command shows on a terminal of its own."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "ftune", "preview", "recipe.yaml", "--rows", "1"]
    done = subprocess.Popen(command, cwd=home, stdout=slave, stderr=slave, env=_environment(home) | environment)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # Linux: the other end was closed
        while part := os.read(master, 4096):
            shown += part
    os.close(master)
    assert done.wait() == 0
    return shown.decode()


def _environment(home: Path) -> dict[str, str]:
    root = Path(__file__).parents[2]
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    return {**kept, "PYTHONPATH": str(root), "FTUNE_CACHE": str(home / "cache"), "TERM": "xterm-256color"}


def test_json_is_a_line_a_row_and_the_audit(preview: Preview, home: Path) -> None:
    done = preview("--json", "--rows", "26")
    assert (done.returncode, done.stderr) == (0, "")
    *rows, last = map(json.loads, done.stdout.splitlines())
    assert [row["row"] for row in rows] == list(range(1, 27))
    for row in rows:
        assert list(row) == ["row", "file", "text", "tokens", "supervised", "truncated", "problems"]
        assert len(row["tokens"]) == len(row["supervised"])
        assert "".join(row["tokens"]) == row["text"][: len("".join(row["tokens"]))]
        assert row["truncated"] == ("".join(row["tokens"]) != row["text"])
    said = ["".join(text for text, counts in zip(r["tokens"], r["supervised"], strict=True) if counts) for r in rows]
    assert said[:3] == [ROWS[at]["messages"][1]["content"] + "<|im_end|>" for at in range(3)]
    assert [row["problems"] for row in rows[:6]] == [
        [],
        ["broken-text"],
        [],
        ["duplicate"],
        ["cut"],
        ["no-answer", "empty-answer"],
    ]
    assert rows[4]["truncated"]
    assert list(last) == ["audit"]
    audit = last["audit"]["train"]
    assert audit["tokens"] == sum(len(row["tokens"]) for row in rows) - len(rows[5]["tokens"])
    assert audit["supervised_tokens"] == sum(sum(row["supervised"]) for row in rows)
    counts = {found["kind"]: found["rows"] for found in audit["findings"]}
    assert counts == {"no-answer": 1, "cut": 1, "empty-answer": 1, "broken-text": 1, "duplicate": 1}
    assert sum(audit["lengths"]["counts"]) == audit["rows"] == 25
    assert set(audit["padding"]) == {"now", "random", "group_by_length", "max_tokens_per_batch", "packing"}


def test_both_texts_of_a_preference_row() -> None:
    tokenizer = make_tokenizer()
    encoding = Encoding(plugin.format_named("preference"), tokenizer, True, 200)
    values = {"prompt": [{"role": "user", "content": "Hi?"}], "chosen": "Yes", "rejected": "No"}
    (worked,) = encoding.worked([Row("rows.jsonl", 7, values)], Faults(most=1))
    row = shown_row(tokenizer, worked, encoding, ["length-margin"])
    line = row.as_line()
    assert list(line["views"]) == ["chosen", "rejected"]
    assert line["tokens"] == line["views"]["chosen"]["tokens"]
    out = io.StringIO()
    Printer(out).row(row, positions=False)
    assert "rows.jsonl:7  length-margin" in out.getvalue()
    assert re.search(r"^chosen: \d+ tokens, 4 learned$", out.getvalue(), re.MULTILINE)
    assert "[[N|o|<|im_end|>]]" in out.getvalue().replace("\u00a6", "|")


@pytest.mark.parametrize("kind", ["bytes", "merged", "pieces", "stripped"])
def test_the_texts_of_tokens_make_the_text(kind: str) -> None:
    tokenizer = template_families.tokenizer_of("zephyr", "pieces" if kind == "stripped" else kind)
    if kind == "stripped":  # as Llama 2's, which takes a blank off the beginning of what it decodes
        tokenizer = copy.deepcopy(tokenizer)
        backend = tokenizer.backend_tokenizer
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)])
    text = "<s> What  is it?\n\n \u4f60\u597d \U0001f600 caf\u00e9</s>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids)
    assert len(texts) == len(ids)
    assert "\ufffd" not in "".join(texts)


def test_only_rows_with_a_finding(preview: Preview, home: Path) -> None:
    for kind, number in (("duplicate", 4), ("cut", 5)):
        done = preview("--json", "--problem", kind)
        (row, _) = map(json.loads, done.stdout.splitlines())
        assert (row["row"], row["problems"]) == (number, [kind])
    done = preview("--problem", "dupplicate")
    assert done.returncode == 2
    assert "did you mean duplicate?" in done.stderr
    assert "no row of train is `joined`" in preview("--problem", "joined").stdout


def test_positions_and_packed_sequences(preview: Preview, home: Path) -> None:
    done = preview("--rows", "1", "--positions")
    assert re.search(r"^ +0 +0 +<\|im_start\|> *$", done.stdout, re.MULTILINE)
    assert len(re.findall(r" yes *$", done.stdout, re.MULTILINE)) == len("Lima,\nof course") + 1
    packed = preview("--rows", "2", "--packing", "--set", "data.max_length=240")
    first = re.search(r"^sequence 1: (\d+) rows, (\d+) of 240 places$", packed.stdout, re.MULTILINE)
    assert first
    sizes = re.findall(r"^---- \S+jsonl:\d+ \((\d+) tokens\)$", packed.stdout, re.MULTILINE)[: int(first[1])]
    assert sum(map(int, sizes)) == int(first[2])


def test_evaluation_rows(preview: Preview, home: Path) -> None:
    write(home / "eval.jsonl", [ROWS[7], chat("New?", "Yes")])
    done = preview("--part", "eval", "--set", "data.eval=eval.jsonl", "--json")
    *rows, last = map(json.loads, done.stdout.splitlines())
    assert [row["problems"] for row in rows] == [["train-in-eval"], []]
    (found,) = last["audit"]["eval"]["findings"]
    assert found["examples"][0]["like"].endswith("train.jsonl:8")
    assert preview("--part", "eval").returncode == 2


def test_a_run_in_the_directory_is_no_matter(preview: Preview, home: Path) -> None:
    (home / "runs" / "x" / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    (home / "runs" / "x" / "run.json").write_text("{}")
    assert preview("--rows", "1").returncode == 0


def test_what_would_stop_a_run_has_its_exit_code(preview: Preview, home: Path) -> None:
    assert preview("--set", "training.sede=1").returncode == 2
    assert preview("--set", "data.train=trian.jsonl").returncode == 4
    refused = preview("--set", "data.audit_ignore=[dupplicate]")
    assert refused.returncode == 2
    assert "did you mean `duplicate`?" in refused.stderr
    write(home / "bad.jsonl", [ROWS[0], {"mesages": []}])
    bad = preview("--set", "data.train=bad.jsonl", "--rows", "1")
    assert bad.returncode == 4
    assert "[[L" in bad.stdout  # what can be shown is shown
    assert "bad.jsonl:2" in bad.stderr
    write(home / "none.jsonl", [chat("Hello?", "")])
    none = preview("--set", "data.train=none.jsonl", "--html", "page.html")
    assert none.returncode == 4
    assert "nothing to learn from" in none.stderr
    assert "nothing to learn from" in (home / "page.html").read_text(encoding="utf-8")
    (home / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}", encoding="utf-8")
    endless = preview("--set", "data.chat_template=plain.jinja", "--rows", "1", "--json")
    assert endless.returncode == 4
    assert "[never-stops]" in endless.stderr
    audit = json.loads(endless.stdout.splitlines()[-1])["audit"]
    assert "fatal" in {found["severity"] for found in audit["train"]["findings"]}


class Page(HTMLParser):
    """What stands in a page: rows, the words of its tokens, and whatever it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.scripts, self.loaded, self.open = 0, [], []  # type: ignore[var-annotated]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        named = dict(attrs)
        self.scripts += tag == "script"
        self.loaded += [value for key, value in attrs if key in ("src", "href") and not str(value).startswith("#")]
        if tag == "article":
            self.rows.append({"problems": named["data-problems"].split(), "learned": "", "text": ""})
        self.open = [*self.open, (tag, named.get("class") or "")]

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] == "i" and self.rows:
            self.rows[-1]["text"] += data
            self.rows[-1]["learned"] += data if "learned" in self.open[-1][1] else ""


def test_a_page_of_its_own(preview: Preview, home: Path) -> None:
    done = preview("--html", "out/page.html", "--rows", "3")
    assert (done.returncode, done.stdout.strip()) == (0, "out/page.html")
    text = (home / "out" / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loaded == []
    assert page.scripts == 1
    assert "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "\x1b" not in text
    assert [row["learned"] for row in page.rows[:1]] == ["Lima,\u21b5\nof course<|im_end|>"]
    assert {kind for row in page.rows for kind in row["problems"]} == {
        "broken-text", "duplicate", "cut", "no-answer", "empty-answer",
    }  # fmt: skip
    assert "\\x1b[31mred" in page.rows[2]["text"]
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser to open the page in")
    for wanted, shown in (("", len(page.rows)), ("#kind=cut", 1), ("#words=PERU", 2), ("#kind=*", 4)):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        address = (home / "out" / "page.html").as_uri() + wanted
        opened = subprocess.run([*command, address], capture_output=True, text=True, check=True, timeout=60)
        assert f">{shown} of {len(page.rows)} rows<" in opened.stdout
        assert opened.stdout.count('hidden=""') == len(page.rows) - shown
