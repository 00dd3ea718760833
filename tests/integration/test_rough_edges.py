"""What users do to a program without meaning to: closed pipes, odd folders, models that cannot do what is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import recipe, rows_file

ROOT = Path(__file__).parents[2]


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `ftune` stands for this checkout's; its exit code is ftune's own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = line.replace("ftune", f"{sys.executable} -m ftune", 1) + "\nexit ${PIPESTATUS[0]}"
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def written(tmp_path: Path, model: Path, **changes: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        rows_file(rows, 8)
    path.write_text(yaml.safe_dump(recipe(model, rows, tmp_path / "run", **changes)), encoding="utf-8")
    return path


def test_a_reader_that_leaves_does_not_end_a_command(tmp_path: Path) -> None:
    made = shell("ftune explain 2>&1 | true", tmp_path)
    assert made.returncode == 0, made.stderr
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        made = shell(f"ftune schema {closed}", tmp_path)
        assert made.returncode == 0, made.stderr


def test_a_reader_that_leaves_does_not_end_the_training(tmp_path: Path, tiny_model: Path) -> None:
    path = written(tmp_path, tiny_model)
    made = shell(f"ftune train {path} 2>&1 | true", tmp_path)
    assert made.returncode == 0, made.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"


def test_chat_without_input_says_so(tmp_path: Path, tiny_model: Path) -> None:
    made = shell(f"ftune chat {tiny_model} <&-", tmp_path)
    assert made.returncode == 2
    assert "--prompt" in made.stderr
    assert "Traceback" not in made.stderr


@pytest.mark.parametrize("output", ["/proc/x/r.yaml", "/proc/x.yaml"])
def test_init_where_nothing_can_be_written(output: str, tmp_path: Path) -> None:
    made = shell(f"ftune init --output {output}", tmp_path)
    assert made.returncode == 2
    assert "cannot write" in made.stderr


def test_plain_rows_are_asked_as_they_were_trained(
    tmp_path: Path, make_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftune import chat
    from ftune.data.detect import reads_plain_text
    from ftune.models import generate
    from ftune.plugin import PlainText
    from ftune.recipe.schema import Data
    from ftune.training import samples

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Q{n}: ", "completion": f"A{n}"}) + "\n" for n in range(8)))
    model = make_tiny(tmp_path / "tiny")
    asked: list[Any] = []
    encode = generate.encode

    def spy(tokenizer: Any, prompt: Any) -> Any:
        asked.append((prompt, ids := encode(tokenizer, prompt)))
        return ids

    monkeypatch.setattr(generate, "encode", spy)
    for own in (None, ["Q9: "]):
        home = tmp_path / f"run-{bool(own)}"
        settings = recipe(model, rows, home, training={"sample_prompts": own, "sample_max_new_tokens": 2})
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
        made = shell(f"ftune train {tmp_path / 'r.yaml'}", tmp_path)
        assert made.returncode == 0, made.stderr
        written = json.loads((home / "samples.jsonl").read_text().splitlines()[0])
        assert written["prompt"] == (own[0] if own else "Q0: ")
    assert samples._as_trained(("Q9: ",), Data(train=str(rows), format="prompt_completion")) == (PlainText("Q9: "),)
    opened, tokenizer = chat.open_target(str(home))
    chat.ask(opened, tokenizer, "Q1: ", system=None, max_new_tokens=2, temperature=0.0)
    assert tokenizer.decode(asked[-1][1][0]) == "Q1: "
    turns = tmp_path / "turns.jsonl"
    turns.write_text(json.dumps({"prompt": [{"role": "user", "content": "Hi"}], "completion": [
        {"role": "assistant", "content": "Ho"}]}) + "\n")  # fmt: skip
    assert not reads_plain_text(Data(train=str(turns), format="prompt_completion"))
    assert not reads_plain_text(Data(train="gone", format="messages"))


@pytest.mark.parametrize("kind", ["OPTConfig", "BloomConfig", "MambaConfig", "LlamaConfig"])
def test_packing_is_refused_where_rows_would_mix(kind: str, tiny_model: Path) -> None:
    import torch
    import transformers

    from ftune.errors import RecipeError
    from ftune.recipe.schema import Recipe
    from ftune.training.fit import check_packing

    shape = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more: dict[str, dict[str, Any]] = {
        "OPTConfig": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "BloomConfig": {"n_head": 4, "n_layer": 2},
        "LlamaConfig": {"intermediate_size": 64},
    }
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**shape, **more.get(kind, {})})
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    for packing in (False, True):
        methods = {"objective": {"method": "sft"}, "tuning": {"method": "full"}}
        settings = recipe(tiny_model, Path("rows.jsonl"), Path("run"), data={"packing": packing}, **methods)
        made = Recipe.from_dict({**settings, "distributed": {}})
        if packing and kind != "LlamaConfig":
            with pytest.raises(RecipeError, match="see each other"):
                check_packing(made, model)
        else:
            check_packing(made, model)
        assert model.training


def test_a_run_refuses_to_pack_where_rows_would_mix(tmp_path: Path, tiny_model: Path) -> None:
    import transformers
    from conftest import make_tokenizer

    import ftune
    from ftune.errors import RecipeError

    config = transformers.BloomConfig(vocab_size=260, hidden_size=32, n_head=4, n_layer=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    make_tokenizer().save_pretrained(tmp_path / "bloom")
    rows = rows_file(tmp_path / "rows.jsonl", 8)
    with pytest.raises(RecipeError, match="see each other"):
        ftune.train(recipe(tmp_path / "bloom", rows, tmp_path / "run", data={"packing": True}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_knows_which_tokens_the_model_has(tmp_path: Path, make_tiny: Callable[..., Path]) -> None:
    from conftest import make_tokenizer

    import ftune
    from ftune.errors import RecipeError

    rows = rows_file(tmp_path / "rows.jsonl", 8)
    few = make_tiny(tmp_path / "few", vocab_size=100)
    with pytest.raises(RecipeError, match="the model does not know the tokens"):
        ftune.train(recipe(few, rows, tmp_path / "refused"))
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()
    # A padding token that the model has no embedding for is not what batches are padded with.
    model, tokenizer = make_tiny(tmp_path / "padded"), make_tokenizer()
    for name in ("<padding>", "<padding2>"):
        tokenizer.add_special_tokens({"pad_token": name})
    assert tokenizer.pad_token_id >= 260
    tokenizer.save_pretrained(model)
    assert ftune.train(recipe(model, rows, tmp_path / "run")).status == "finished"


def test_tokens_without_an_embedding_are_named(tiny_model: Path) -> None:
    from conftest import make_model, make_tokenizer

    from ftune.data.collate import padding_id
    from ftune.errors import RecipeError
    from ftune.training.fit import check_vocabulary

    model, tokenizer = make_model(), make_tokenizer()
    check_vocabulary(tokenizer, model)
    assert padding_id(tokenizer, 260) == tokenizer.pad_token_id
    tokenizer.add_special_tokens({"pad_token": "<padding>", "additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<padding2>"})
    assert len(tokenizer) > 260
    check_vocabulary(tokenizer, model)  # neither padding nor a name for what text never holds does harm
    assert padding_id(tokenizer, 260) == tokenizer.eos_token_id
    tokenizer.add_tokens(["<word>"])
    with pytest.raises(RecipeError, match="<word>"):
        check_vocabulary(tokenizer, model)


def test_vocabulary_is_judged_by_the_rows_where_they_are_known(tiny_model: Path) -> None:
    import numpy
    from conftest import make_model, make_tokenizer

    from ftune.data import tokens
    from ftune.data.mixing import mix
    from ftune.data.prepare import Prepared
    from ftune.data.sequences import sequences
    from ftune.errors import RecipeError
    from ftune.training.fit import check_vocabulary

    def kept(ids: list[int]) -> tokens.Kept:
        return tokens.Kept(0, 1, (tokens.TokenRow(numpy.array(ids), numpy.zeros((0, 2), dtype=numpy.int32)),))

    model, tokenizer = make_model(vocab_size=258), make_tokenizer()
    fine, wrong = (
        sequences([stored], ["x"], mix([2], None, stop="all_exhausted", seed=0), ("",), capacity=None)
        for stored in (
            tokens.write(None, "", ("",), numpy.uint16, [kept([1, 2]), kept([number])]) for number in (257, 258)
        )
    )
    check_vocabulary(tokenizer, model, Prepared(fine, None, "text"))
    for data in (Prepared(wrong, None, "text"), Prepared(fine, wrong, "text")):
        with pytest.raises(RecipeError, match="258"):
            check_vocabulary(tokenizer, model, data)


def test_a_tokenizer_without_any_special_token(tmp_path: Path) -> None:
    from conftest import make_tokenizer

    from ftune.data.collate import padding_id
    from ftune.models.load import read_tokenizer

    made = make_tokenizer(None)
    made.pad_token = made.eos_token = made.bos_token = None
    made.save_pretrained(tmp_path)
    said: list[str] = []
    tokenizer = read_tokenizer(str(tmp_path), say=said.append)
    assert padding_id(tokenizer, 260) == 0
    assert "None" not in said[0]


def test_an_unwritable_cache_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftune.cache import content_hash
    from ftune.data import cache as store
    from ftune.errors import MachineError
    from ftune.models import gguf

    monkeypatch.setenv("FTUNE_CACHE", "/proc/nowhere")
    assert store.writable(Path("/proc/nowhere/tokens")) is None
    assert store.writable(tmp_path / "tokens") == tmp_path / "tokens"
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert len(content_hash(tmp_path / "x.gguf")) == 64
    with pytest.raises(MachineError, match="FTUNE_CACHE"):
        gguf.converted(tmp_path / "x.gguf", "x.gguf", print)


def test_logs_survive_odd_letters(tmp_path: Path) -> None:
    from ftune.rundir import read_whole_lines

    path = tmp_path / "samples.jsonl"
    rows = [{"a": "one\u2028two"}, {"a": "\u00e4"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("\n".join([lines[0], "3", "half", lines[1], '{"a": "\u00e4']).encode()[:-1])
    assert read_whole_lines(path) == rows
    assert read_whole_lines(tmp_path / "none") == []


@pytest.mark.parametrize("text", ["null", "3", "[]"])
def test_a_run_file_that_is_no_object(text: str) -> None:
    from ftune.resolve.spec import RunSpec

    with pytest.raises(ValueError, match="object"):
        RunSpec.from_json(text)


def test_where_a_merge_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftune import export, rundir
    from ftune.errors import RecipeError

    monkeypatch.chdir(tmp_path)
    for output in (".", "/proc/x", "/proc/x/y"):
        with pytest.raises(RecipeError, match=r"write|place"):
            export._require_writable(Path(output))
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    export._require_writable(link)
    with rundir.whole_directory(link.resolve()) as partial:
        (partial / "x").write_text("x")
    assert (link / "x").read_text() == "x"
    assert link.is_symlink()
