"""A tokenizer as llama.cpp keeps it: tokens, types, merges, and the name of its way to split text."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from ftune.errors import Problem, RecipeError
from ftune.models.quiet import quiet

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_NAME = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPLITS = {
    rf"{_ENDINGS}|{_LETTERS}|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_ENDINGS}|{_LETTERS}|\p{{N}}{_REST}": "qwen2",
    rf"{_WORD}|{_NAME}|\p{{N}}{_SIGNS}": "tekken",
    rf"{_WORD}{_ENDINGS}?|{_NAME}{_ENDINGS}?|\p{{N}}{{1,3}}{_SIGNS}": "gpt-4o",
}
"""The regular expression that text is split by, as tokenizer.json has it, and llama.cpp's name of it."""


def kind_of(tokenizer: Any) -> tuple[str, str]:
    """Return llama.cpp's names of the tokenizer's model and of its way to split text; RecipeError for others."""
    if not getattr(tokenizer, "is_fast", False):
        raise _unknown("it is not in the form of tokenizer.json")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE":
        raise _unknown(f"its model is {parts['model']['type']}, not byte-pair encoding")
    if parts["model"].get("byte_fallback"):
        return "llama", "default"
    if (parts["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _unknown(f"it changes letters before it splits them ({parts['normalizer']['type']})")
    steps = _steps(parts["pre_tokenizer"])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise _unknown("it does not split bytes as GPT-2 and its successors do")
    before, by_regex = steps[:-1], steps[-1].get("use_regex", True)
    if not before and by_regex:
        return "gpt2", "gpt-2"
    if len(before) == 1 and before[0]["type"] == "Digits" and before[0].get("individual_digits") and by_regex:
        return "gpt2", "smollm"
    if len(before) == 1 and before[0]["type"] == "Split" and not by_regex:
        pattern = before[0]["pattern"].get("Regex", "")
        if pattern in SPLITS and before[0]["behavior"] == "Isolated":
            return "gpt2", SPLITS[pattern]
    raise _unknown("ftune knows no name of llama.cpp's for its way to split text")


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _unknown(why: str) -> RecipeError:
    fix = "export safetensors, and convert them with llama.cpp's convert_hf_to_gguf.py, which knows more tokenizers"
    what = "the model's tokenizer cannot be written as GGUF"
    return RecipeError(Problem("gguf-tokenizer", what, why=why, fix=fix))


def describe(writer: GGUFWriter, tokenizer: Any, rows: int, ends: list[int]) -> None:
    """Write the tokenizer for a model of so many embedding rows, which ends its answers with any of `ends`."""
    model, split = kind_of(tokenizer)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = _tokens(tokenizer, parts, rows)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            tokenizer.save_pretrained(folder)
        special = SpecialVocab(Path(folder), load_merges=True)
    if model == "llama":
        writer.add_token_scores(_scores(tokens, special.merges))
        writer.add_add_space_prefix(_prepends(parts))
    else:
        writer.add_token_merges(special.merges)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    others = [number for number in ends if number != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if special.chat_template:
        writer.add_chat_template(special.chat_template)


def _tokens(tokenizer: Any, parts: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return every row's token and what it is; rows that no token has are filled up."""
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_number) >= rows:
        what = f"the tokenizer writes token {max(by_number)}, and the model has {rows} embeddings"
        raise RecipeError(Problem("vocabulary", what, fix="use the tokenizer that belongs to the model"))
    added = {entry["id"]: entry for entry in parts["added_tokens"]}
    unknown = parts["model"].get("unk_token")
    tokens, types = [], []
    for number in range(rows):
        token = by_number.get(number, f"[PAD{number}]")
        if number not in by_number:
            kind = TokenType.UNUSED
        elif token == unknown:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        elif parts["model"].get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return the order of merging as scores: llama.cpp joins the pair first whose whole has the highest."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends(parts: dict[str, Any]) -> bool:
    """Return whether a space is put before a text, as SentencePiece does."""
    text = json.dumps([parts["normalizer"], parts["pre_tokenizer"]])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
