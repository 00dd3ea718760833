"""What tests share: a real model small enough to make in the test, and `ftune` as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Return a tokenizer of single bytes, so that it can write anything."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|im_start|>", "<|im_end|>", "<|pad|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = template
    return made


def make_model(seed: int = 0, **changes: Any) -> Any:
    """Return a random Llama of 2 layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    settings = {**shape, **heads, **ids, "initializer_range": 0.2, "tie_word_embeddings": False, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and its tokenizer; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Path]:
    """Return a function that writes a tiny model, changed as asked, and its tokenizer into a folder."""

    def make(folder: Path, *, dtype: str = "float32", template: str | None = TEMPLATE, **changes: Any) -> Path:
        import torch

        make_model(**changes).to(getattr(torch, dtype)).save_pretrained(folder)
        make_tokenizer(template).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def launched() -> Callable[[dict[str, Any], Path], None]:
    """Return a function that trains a recipe, written into a folder, on two ranks, as torchrun starts them."""
    import yaml

    def launch(values: dict[str, Any], folder: Path) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        root = Path(__file__).parents[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        command += ["--no-python", sys.executable, "-m", "ftune", "train", str(folder / "recipe.yaml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return launch


@pytest.fixture(scope="session")
def ftune() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `ftune` as a user does."""
    root = Path(__file__).parents[1]

    def run(*arguments: str | Path, cwd: Path | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **more.pop("env", {})}
        command: Sequence[str] = [sys.executable, "-m", "ftune", *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd or root, env=environment, capture_output=True, text=True, check=False, **more
        )

    return run
