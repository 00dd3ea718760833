"""`ftune export`: every format of a run of LoRA and of full tuning, and what is refused before any work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import write_run
from safetensors.torch import load_file, save_file
from training_runs import recipe, rows_file

import ftune as package
from ftune import chat, export, plugin, rundir
from ftune.errors import FtuneError, MachineError, RecipeError, RunError

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, make_tiny: Callable[..., Path]) -> Path:
    """Return a folder with a base, and finished runs `lora` and `full` on it; copy before changing."""
    folder = tmp_path_factory.mktemp("exports")
    make_tiny(folder / "base", initializer_range=0.05)
    rows = rows_file(folder / "rows.jsonl", 8)
    for name, tuning in (("lora", {"method": "lora", "r": 2}), ("full", {"method": "full"})):
        changes: dict[str, Any] = {"tuning": tuning, "data": {"eval": 0.25}}
        training = {"max_steps": 2, "sample_prompts": ["Say hello"]}
        package.train(recipe(folder / "base", rows, folder / name, training=training, **changes))
    return folder


@pytest.fixture
def lora(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "lora", tmp_path / "lora"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=torch.tensor([[0, 20, 30, 40, 50, 60]])).logits
    return made


def of_run(directory: Path) -> torch.Tensor:
    return logits(chat.open_target(str(directory))[0].float())


@pytest.mark.parametrize("run", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_safetensors_load_in_plain_transformers(run: str, dtype: str, home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = export.export(home / run, tmp_path / "out", format="safetensors", dtype=dtype, max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)
    assert (logits(model.float()) - of_run(home / run)).abs().max() < (1e-4 if dtype == "float32" else 0.2)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert made.prompts == 4
    assert (made.max_difference == 0) == (run == "full" and dtype == "float32")


def test_an_adapter_loads_in_plain_peft(home: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = export.export(home / "lora", tmp_path / "out", format="adapter")
    assert (made.dtype, made.max_difference) == ("float32", 0.0)
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "out")), of_run(home / "lora"))
    half = export.export(home / "lora", tmp_path / "half", format="adapter", dtype="bfloat16", free_bytes=0)
    assert half.computed == ("layer by layer", "layer by layer")
    stored = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}


def test_a_hub_folder_says_where_the_model_comes_from(home: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    shutil.copytree(home / "lora", tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(
        (home / "lora" / "run.json").read_text().replace(str(home / "base"), str(tmp_path / "base"))
    )
    shutil.copytree(home / "base", tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    export.export(tmp_path / "run", tmp_path / "out", format="hub")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    result = json.loads((home / "lora" / "result.json").read_text())
    assert card.data.license == "mit"
    assert card.data.tags == ["ftune", "sft", "lora"]
    assert card.data.eval_results[0].metric_value == round(result["eval_loss"], 4)
    assert card.data.base_model is None, "a folder of this machine is no name on the hub"
    spec = json.loads((home / "lora" / "run.json").read_text())
    for said in (
        f"| training loss | {result['train_loss']:.4f} |\n| evaluation loss | {result['eval_loss']:.4f} |\n",
        f"- `rows.jsonl` (SHA-256 `{next(iter(spec['data_fingerprint'].values()))}`)",
        "tuning:\n  method: lora",
        f"- torch {spec['versions']['torch']}\n",
        "The base states the licence `mit`.",
        (home / "lora" / "environment.txt").read_text().splitlines()[0].removeprefix("# "),
    ):
        assert said in card.content
    assert str(home) not in card.content
    assert str(tmp_path) not in card.content


def test_the_command(home: Path, tmp_path: Path, ftune: Callable[..., Any]) -> None:
    answer = ftune("export", home / "full", "--format", "safetensors", "--output", tmp_path / "out")
    assert answer.returncode == 0, answer.stderr
    assert "beside the run on 4 prompts: largest logit difference 0, mean KL 0 (allowed: 0.001" in answer.stdout
    assert "asking the run's model, in memory\n" in answer.stderr
    for folder in (home / "full" / "model", tmp_path / "out"):
        modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
        assert modes == {folder.stat().st_mode & 0o666}, "a user shares them, and has an umask to say with whom"
    wrong = ftune("export", home / "full", "--format", "safetensor", "--output", tmp_path / "other")
    assert wrong.returncode == 2
    assert "did you mean `safetensors`?" in wrong.stderr


@pytest.mark.parametrize("name", ["safetensors", pytest.param("gguf", marks=pytest.mark.slow)])
def test_a_full_disk_leaves_nothing(name: str, home: Path, tmp_path: Path) -> None:
    """A limit on the size of files is the disk's end for one process."""
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from ftune.cli import main\n"
        f"sys.argv = ['ftune', 'export', {str(home / 'lora')!r}, '--format', '{name}', '--output', 'out']\n"
        "main()"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    # Not even Python may write a file that is cut short.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"}
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 5, answer.stderr
    assert "could not write `out`; nothing was left" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob("ftune-*")) == []


def test_a_disk_without_room_is_seen_before(tmp_path: Path) -> None:
    """The base has more bytes than the disk is free, written as a file with a hole."""
    import struct

    from conftest import make_tokenizer
    from transformers import LlamaConfig

    rows = shutil.disk_usage(tmp_path).free // (4 * 1024) + 1_000_000
    shape = {"vocab_size": rows, "hidden_size": 1024, "intermediate_size": 8, "num_hidden_layers": 0}
    base = tmp_path / "run" / "model"
    run = write_run(tmp_path / "run", base)
    LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=True, dtype="float32").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    embeddings = {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}
    norm = {"dtype": "F32", "shape": [1024], "data_offsets": [rows * 4096, rows * 4096 + 4096]}
    header = json.dumps({"model.embed_tokens.weight": embeddings, "model.norm.weight": norm}).encode()
    with (base / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + rows * 4096 + 4096)
    error = refused(run, tmp_path / "out", format="safetensors")
    assert (type(error), error.problems[0].rule) == (MachineError, "disk-room")


def refused(run: Path, output: Path, **options: Any) -> FtuneError:
    before = sorted(path.name for path in output.parent.iterdir())
    with pytest.raises(FtuneError) as caught:
        export.export(run, output, **{"format": "safetensors", **options})
    assert caught.value.problems[0].fix
    assert sorted(path.name for path in output.parent.iterdir()) == before
    return caught.value


def test_what_makes_no_sense_is_refused(home: Path, tmp_path: Path) -> None:
    error = refused(home / "full", tmp_path / "out", format="adapter")
    assert (type(error), error.problems[0].rule) == (RecipeError, "not-an-adapter")
    error = refused(home / "lora", tmp_path / "out", dtype="q8_0")
    assert (type(error), error.problems[0].rule) == (RecipeError, "bad-value")
    error = refused(home / "lora", tmp_path / "out", max_shard_size="many")
    assert (type(error), error.problems[0].rule) == (RecipeError, "bad-value")
    for name in plugin.names(plugin.EXPORTS):
        if not plugin.export(name).shards:
            error = refused(home / "lora", tmp_path / "out", format=name, max_shard_size="1GB")
            assert (type(error), error.problems[0].rule) == (RecipeError, "no-shards")
            assert "hub, low_bit, nf4, safetensors, torchao" in error.problems[0].fix
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    error = refused(home / "lora", tmp_path / "out")
    assert (type(error), error.problems[0].rule) == (RecipeError, "output-exists")


def with_base(run: Path, base: Path) -> Path:
    """Make a run believe that it was trained on a base that lies elsewhere."""
    path = run / rundir.RUN
    spec = json.loads(path.read_text())
    spec["recipe"]["model"]["model_name_or_path"] = str(base)
    path.write_text(json.dumps(spec))
    return run


def everything_refuses(run: Path, output: Path) -> list[str]:
    """Return the rule by which chat, merge and export refuse a run, each with exit code 5."""
    rules = []
    for act in (
        lambda: chat.open_target(str(run)),
        lambda: export.merge(run, output),
        lambda: export.export(run, output, format="adapter"),
    ):
        with pytest.raises(RunError) as caught:
            act()
        assert caught.value.problems[0].fix
        rules.append(caught.value.problems[0].rule)
    assert not output.exists()
    return rules


def test_another_base_of_the_same_shape(lora: Path, tmp_path: Path, make_tiny: Callable[..., Path]) -> None:
    with_base(lora, make_tiny(tmp_path / "other", initializer_range=0.05, seed=1))
    assert everything_refuses(lora, tmp_path / "out") == ["base-differs"] * 3
    (lora / rundir.MODEL / rundir.BASE_FINGERPRINT).unlink()
    export.merge(lora, tmp_path / "out")  # as the message advises where the change is meant


def test_another_base_of_another_shape(lora: Path, tmp_path: Path, make_tiny: Callable[..., Path]) -> None:
    with_base(lora, make_tiny(tmp_path / "other", hidden_size=64))
    assert everything_refuses(lora, tmp_path / "out") == ["base-differs"] * 3
    (lora / rundir.MODEL / rundir.BASE_FINGERPRINT).unlink()
    assert everything_refuses(lora, tmp_path / "out") == ["base-differs"] * 3


def test_a_base_in_other_shards_is_the_same(lora: Path, home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(home / "base", tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(home / "base").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    export.merge(with_base(lora, tmp_path / "sharded"), tmp_path / "out")


@pytest.mark.parametrize("cut", ["header", "data", "text"])
@pytest.mark.parametrize("whose", ["base", "adapter"])
def test_damaged_files(cut: str, whose: str, lora: Path, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "base", tmp_path / "base")
    with_base(lora, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    path = path if whose == "base" else lora / rundir.MODEL / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"header": whole[:100], "data": whole[:-100], "text": b"not tensors at all"}[cut])
    assert everything_refuses(lora, tmp_path / "out") == ["weights-damaged"] * 3


@pytest.mark.parametrize("whose", ["base", "adapter"])
def test_pickles(whose: str, lora: Path, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "base", tmp_path / "base")
    with_base(lora, tmp_path / "base")
    folder, stem, pickled = (
        (tmp_path / "base", "model", "pytorch_model.bin")
        if whose == "base"
        else (lora / rundir.MODEL, "adapter_model", "adapter_model.bin")
    )
    torch.save(load_file(folder / f"{stem}.safetensors"), folder / pickled)
    (folder / f"{stem}.safetensors").unlink()
    assert everything_refuses(lora, tmp_path / "out") == ["pickle-weights"] * 3


def test_numbers_beyond_float16(home: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(home / "full", tmp_path / "run"))
    path = run / rundir.MODEL / "model.safetensors"
    values = load_file(path)
    values["model.layers.0.mlp.up_proj.weight"][3, 3] = 7e4
    save_file(values, path, {"format": "pt"})
    for name in ("safetensors", "gguf"):
        error = refused(run, tmp_path / "out", format=name, dtype="float16")
        assert (type(error), error.problems[0].rule) == (RunError, "dtype-range")
