"""GGUF, which llama.cpp and what is built on it read: Ollama, LM Studio and others."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ftune.plugin import Export, Tolerance
from ftune.weights.tolerances import FLOATS, ROUNDED


class Gguf(Export):
    name = "gguf"
    summary = "One GGUF file for llama.cpp, with tokenizer and chat template, an adapter folded in."
    read_by = "llama.cpp and what is built on it; in plain transformers with gguf_file"
    # Q8_0 rounds each block of 32 weights to 8 bits: ten times what SmolLM2-135M shows. It shows names and rotary pairs
    # that another reader takes otherwise, and not what a small part of an adapter does.
    tolerances = {**FLOATS, "q8_0": Tolerance("mean KL", 2e-2)}
    rounds = ROUNDED | {"q8_0"}
    refuses = "models other than Llama, Mistral, Qwen2 and Qwen3, and tokenizers that llama.cpp has no name for"

    def default_dtype(self, source: Any) -> str:
        return "bfloat16" if source.stored_dtype == "bfloat16" else "float16"

    def check(self, source: Any) -> None:
        from ftune.exports.gguf import _architecture, _vocabulary

        source.require_plain_weights()
        _architecture.check(source)
        _vocabulary.kind_of(source.tokenizer)

    def write(self, source: Any, folder: Path, *, dtype: str, max_shard_size: str) -> None:
        from ftune.exports.gguf import _writing

        _writing.write(source, folder, dtype)

    def check_rounding(self, source: Any, folder: Path, model: Any, *, dtype: str) -> None:
        from ftune.exports.gguf import _reading

        _reading.check_rounding(source, folder)

    def computing(self, source: Any, folder: Path) -> AbstractContextManager[tuple[Any, str]]:
        from ftune.exports.gguf import _reading

        return _reading.computing(source, folder)


plugin = Gguf()
