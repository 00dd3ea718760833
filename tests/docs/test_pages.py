"""What the pages say is so: links, commands, recipes, keys, and the example that CONTRIBUTING walks through."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import ftune.optimizers
from ftune import plugin
from ftune.cli import app
from ftune.recipe import load
from ftune.recipe.reference import all_keys

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SECTIONS = ("model", "data", "objective", "tuning", "training", "distributed")

pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """Yield the fenced blocks in one of some languages."""
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        if language in languages:
            yield text


def prose(page: Path) -> str:
    """Return a page without its fenced blocks and comments."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pages
def test_pages_are_ascii(page: Path) -> None:
    if page.name in ("recipe.md", "rules.md", "methods.md"):
        return
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        assert line.isascii(), f"{page.name}:{number}: {line}"


def command_lines(page: Path) -> Iterator[str]:
    """Yield what is typed after a prompt, continued lines joined."""
    for block in blocks(page, "console"):
        for line in re.sub(r"\\\n[> ]*", " ", block).splitlines():
            if line.startswith("$ "):
                yield line[2:]


@pages
def test_commands_exist_with_their_options(page: Path) -> None:
    for line in command_lines(page):
        words = shlex.split(line, comments=True)
        for at in [at for at, word in enumerate(words) if Path(word).name == "ftune"]:
            end = next((n for n, word in enumerate(words[at:], at) if word in ("&&", "|", ">", "||", ";")), len(words))
            arguments = words[at + 1 : end]
            if not arguments or arguments[0].startswith("-"):
                assert arguments in (["--help"], ["--version"]), line
                continue
            assert arguments[0] in COMMANDS, line
            known = {option for parameter in COMMANDS[arguments[0]].params for option in parameter.opts} | {"--help"}
            given = {word.partition("=")[0] for word in arguments[1:] if word.startswith("--")}
            assert given <= known, f"{line}: {given - known}"


@pages
def test_commands_in_the_text_exist(page: Path) -> None:
    for name in re.findall(r"`ftune ([a-z]+)\b", prose(page)):
        assert name in COMMANDS, name


@pages
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = prose(page) + "\n".join(f"`{line}`" for line in command_lines(page))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets


@pages
def test_recipes_load(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        if isinstance(values, dict) and {"model", "data"} <= values.keys():
            (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
            load(tmp_path / "recipe.yaml")


@pages
def test_keys_in_the_text_exist(page: Path) -> None:
    known = {f"{key.owner.split(' ')[0].split('.')[0]}.{key.name}" for key in all_keys()}
    pattern = r"`(?:--set )?((?:" + "|".join(SECTIONS) + r")\.[a-z_0-9]+)"
    for name in re.findall(pattern, prose(page)):
        assert name in known or name.endswith((".py", ".safetensors")), name


def test_a_recipe_can_be_a_mapping_as_python_md_says() -> None:
    found = []
    for block in blocks(ROOT / "docs" / "python.md", "python"):
        compile(block, "python.md", "exec")
        found += re.findall(r"^recipe = (\{.*?^\})", block, re.M | re.S)
    assert found
    for text in found:
        load(eval(text, {}))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the example's plugin, found as if its file stood in `ftune/optimizers`."""
    monkeypatch.setattr(ftune.optimizers, "__path__", [*ftune.optimizers.__path__, str(EXAMPLES)])
    plugin.names.cache_clear()
    plugin.get.cache_clear()
    yield plugin.optimizer("ademamix_8bit")
    sys.modules.pop("ftune.optimizers.ademamix_8bit", None)
    vars(ftune.optimizers).pop("ademamix_8bit", None)
    plugin.names.cache_clear()
    plugin.get.cache_clear()


def test_the_example_optimizer_is_one_file(example: Any) -> None:
    from ftune.rules.explanations import explain_name

    assert isinstance(example, plugin.Optimizer)
    assert example.name == "ademamix_8bit"
    training = {"output_dir": "runs/x", "optim": "ademamix_8bit", "optim_args": {"alpha": 8}}
    loaded = load({"model": {"model_name_or_path": "m"}, "data": {"train": "t.jsonl"}, "training": training})
    assert loaded.recipe.optimizer.options.alpha == 8
    assert "Weight of the slow mean" in explain_name("ademamix_8bit")
    assert "torch" not in vars(sys.modules[type(example).__module__])


def test_contributing_shows_the_example_as_it_is() -> None:
    shown = list(blocks(ROOT / "CONTRIBUTING.md", "python"))
    assert (EXAMPLES / "ademamix_8bit.py").read_text(encoding="utf-8") in shown


def test_the_example_optimizer_learns_with_the_state_it_declares(example: Any) -> None:
    pytest.importorskip("bitsandbytes")
    import torch

    weight = torch.nn.Parameter(torch.linspace(-1, 1, 128 * 96).reshape(128, 96))
    groups = [{"params": [weight], "weight_decay": 0.0}]
    optimizer = example.build(groups, learning_rate=1e-2, options=example.Options(), setting=plugin.Setting())
    losses = []
    for _ in range(3):
        loss = (weight**2).mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]
    state = optimizer.state[weight]
    held = sum(state[name].numel() * state[name].element_size() for name in ("state1", "state2", "absmax1", "absmax2"))
    assert held / weight.numel() == pytest.approx(example.state_bytes_per_parameter)
