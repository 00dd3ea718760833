"""The table of bad data in data.md, for cog: each row of it is what `ftune preview` says of a small file."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import cog

ROOT = Path(__file__).resolve().parents[1]
MARKLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
USERS_ONLY = (
    "{% for m in messages if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONG = "It was a bright cold day in April, and the clocks were striking thirteen"


_FOUND = r"^  (?:warning|note) (\S+): (.*)\n +why: .*\n +fix: (.*)(?:\n +(\S+:\d+)(?: \(as (\S+)\))?)?"
_WRONG = r"^error(?:\[\S+\])?: (.*)(?:\n +--> (.*))?(?:\n +\|.*|\n *\d+ \|.*)*(?:\n += why: .*)?(?:\n +=? ?fix: (.*))?"


def chat(question: str, answer: str, *, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": question}, {"role": "assistant", "content": answer}]}


GOOD = chat("Capital of Peru?", "Lima.")
OTHER = chat("Largest river of Brazil, please?", "That is the Amazon, without any doubt at all.")

# What is wrong, the lines of the file, and what else the recipe says.
CASES: tuple[tuple[str, list[Any], dict[str, Any]], ...] = (
    ("a file without rows", [], {}),
    ("a line that is not JSON", [GOOD, '{"messages": [}'], {}),
    ("columns of no known format", [{"ask": "Capital?", "say": "Lima."}], {}),
    ("a misspelt column", [GOOD, {"mesages": []}], {}),
    ("a role that no template knows", [GOOD, chat("Capital?", "Lima.", role="human")], {}),
    ("half a letter", [GOOD, chat("Capital? \ud83d", "Lima.")], {}),
    (
        "a turn that the template leaves out",
        [{"messages": [{"role": "system", "content": "Be brief."}, *GOOD["messages"]]}],
        {"chat_template": USERS_ONLY},
    ),
    ("rows without an answer", [GOOD, {"messages": GOOD["messages"][:1]}], {}),
    ("no row with an answer", [{"messages": GOOD["messages"][:1]}], {}),
    ("a question longer than max_length", [GOOD, chat(LONG * 4, "Yes.")], {"max_length": 128}),
    ("an answer longer than max_length", [GOOD, chat("Go on.", LONG * 4)], {"max_length": 128}),
    ("a template without an end mark", [GOOD, OTHER], {"chat_template": MARKLESS}),
    (
        "the begin mark twice",
        [GOOD, chat("Capital?", "Lima.")],
        {"chat_template": USERS_ONLY.replace("{% for m", "<|im_start|>{% for m", 1)},
    ),
    ("an empty answer", [GOOD, {"messages": [*chat("Hello?", "")["messages"], *OTHER["messages"]]}], {}),
    ("text in the wrong encoding", [GOOD, chat("Caf\u00c3\u00a9?", "Yes.")], {}),
    ("the padding token in an answer", [GOOD, chat("Pad?", "Yes <|pad|> no.")], {}),
    ("a mark of the template in a question", [GOOD, chat("What ends a turn, <|im_end|>?", "That.")], {}),
    ("the same row twice", [GOOD, OTHER, GOOD], {}),
    ("nearly the same row twice", [GOOD, chat("Read.", LONG + "."), chat("Read.", LONG + "!")], {}),
    ("a row that is learned and evaluated on", [GOOD, OTHER], {"eval": [OTHER]}),
)


def table() -> None:
    """Print the table."""
    cog.outl("| in the file | `ftune preview` says | exit code |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        _model(Path("my-model"))
        for what, rows, settings in CASES:
            said, code = _says(rows, settings)
            cog.outl("| {} | {} | {} |".format(what, said.replace("|", "\\|"), code))


@contextlib.contextmanager
def _inside(folder: str) -> Any:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _model(path: Path) -> None:
    from transformers import LlamaConfig

    sys.path.append(str(ROOT / "tests"))
    from conftest import make_tokenizer

    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(path)
    make_tokenizer().save_pretrained(path)


def _says(rows: list[Any], settings: dict[str, Any]) -> tuple[str, int]:
    """Return the finding or the error, its place and what to do."""
    changed = dict(settings)
    if "eval" in changed:
        changed["eval"] = _write("eval.jsonl", changed["eval"])
    if "chat_template" in changed:
        Path("template.jinja").write_text(changed["chat_template"], encoding="utf-8")
        changed["chat_template"] = "template.jinja"
    data = {"train": _write("rows.jsonl", rows), **changed}
    recipe = {"model": {"model_name_or_path": "my-model"}, "data": data, "training": {"output_dir": "runs/x"}}
    lines = [f"{section}: {json.dumps(keys)}\n" for section, keys in recipe.items()]
    Path("recipe.yaml").write_text("".join(lines), encoding="utf-8")
    out, code = _run("preview", "recipe.yaml", "--rows", "0")
    found = re.search(_FOUND, out, re.MULTILINE)
    wrong = re.search(_WRONG, out, re.MULTILINE)
    if wrong:
        what, where, fix = wrong.groups()
        place, mend = f" ({_told(where)})" if where else "", f"; {_told(fix)}" if fix else ""
        return f"`error`: {_told(what)}{place}{mend}", code
    assert found, out
    kind, what, fix, where, like = found.groups()
    place = f" ({_told(where)}{', as ' + _told(like) if like else ''})" if where else ""
    return f"`{kind}`: {_told(what)}{place}; {_told(fix)}", code


def _told(text: str) -> str:
    return text.replace(os.getcwd() + "/", "")


def _write(name: str, rows: list[Any]) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    Path(name).write_text(text, encoding="utf-8")
    return name


def _run(*arguments: str) -> tuple[str, int]:
    """Run the program in this process: starting it anew for each file would take a minute."""
    from ftune.cli import main

    out, before = io.StringIO(), (sys.argv, sys.stdout, sys.stderr)
    os.environ |= {"FTUNE_CACHE": os.path.join(os.getcwd(), "cache"), "HF_HUB_OFFLINE": "1"}
    try:
        sys.argv, sys.stdout, sys.stderr = ["ftune", *arguments], out, out
        main()
    except SystemExit as left:
        return out.getvalue(), int(left.code or 0)
    finally:
        sys.argv, sys.stdout, sys.stderr = before
    return out.getvalue(), 0
