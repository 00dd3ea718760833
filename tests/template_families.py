"""Chat templates of the families users have: their marks, toy tokenizers, and what each writes of an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ftune.plugin import Turn

FOLDER = Path(__file__).parent / "templates"
ROWS = Path(__file__).parents[1] / "recipes" / "data" / "definitions.eval.jsonl"

Said = Callable[[Sequence[Turn], int], str]
"""What the template writes of turn i that is the model's own: its words and its end mark."""


def fullwidth(words: str) -> str:
    """Return a mark as DeepSeek writes it."""
    return f"<\uff5c{words.replace(' ', chr(0x2581))}\uff5c>"


@dataclass(frozen=True)
class Family:
    name: str
    marks: tuple[str, ...]
    said: Said
    calls: bool = False
    """It writes tool calls and their results."""
    alternates: bool = False
    """It refuses two turns of one role in a row."""
    system: bool = True
    thinks: bool = False
    """It takes thinking out of an answer's content or its own key."""
    greedy: bool = False
    """Its special tokens swallow the blanks behind them."""
    words: tuple[str, ...] = field(default=())
    """Added tokens that are no special ones."""
    kinds: tuple[str, ...] = ("bytes", "merged", "trimmed")

    @property
    def template(self) -> str:
        return (FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def _call(turn: Turn, arguments: str = "arguments", tail: str = "") -> str:
    (call,) = turn.extra["tool_calls"]
    written = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return f'{{"name": "weather", "{arguments}": {written}{tail}}}'


def _calls(turn: Turn) -> bool:
    return bool(turn.extra.get("tool_calls"))


def ends(mark: str) -> Said:
    return lambda turns, at: turns[at].content + mark


def trimmed(mark: str, before: str = "") -> Said:
    return lambda turns, at: before + turns[at].content.strip() + mark


def llama3(turns: Sequence[Turn], at: int) -> str:
    turn = turns[at]
    return (_call(turn, "parameters") if _calls(turn) else turn.content.strip()) + "<|eot_id|>"


def mistral(turns: Sequence[Turn], at: int) -> str:
    turn = turns[at]
    if _calls(turn):
        return "[TOOL_CALLS] [" + _call(turn, tail=', "id": "call00001"') + "]</s>"
    return f" {turn.content.strip()}</s>"


def qwen2(turns: Sequence[Turn], at: int) -> str:
    turn, parts = turns[at], [turns[at].content]
    if _calls(turn):
        parts = [part for part in parts if part] + [f"<tool_call>\n{_call(turn)}\n</tool_call>"]
    return "\n".join(parts) + "<|im_end|>"


def qwen3(turns: Sequence[Turn], at: int) -> str:
    turn, last = turns[at], at + 1 == len(turns)
    asked = [number for number, other in enumerate(turns) if other.role == "user" and not _is_result(other.content)]
    said, thought = turn.content, turn.extra.get("reasoning_content")
    if thought is None:
        thought = ""
        if "</think>" in said:
            thought = said.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            said = said.split("</think>")[-1].lstrip("\n")
    text = said
    if at > max(asked, default=len(turns) - 1) and (last or thought):
        bare = thought.strip("\n")
        text = f"<think>\n{bare}\n</think>\n\n" + said.lstrip("\n")
    elif not said.strip() and not _calls(turn):
        return ""
    if _calls(turn):
        text += ("\n" if said else "") + f"<tool_call>\n{_call(turn)}\n</tool_call>"
    return text + "<|im_end|>"


def _is_result(content: str) -> bool:
    return content.startswith("<tool_response>") and content.endswith("</tool_response>")


def phi3(turns: Sequence[Turn], at: int) -> str:
    last = at + 1 == len(turns)
    whole = f"<|assistant|>\n{turns[at].content}<|end|>" + ("\n<|endoftext|>" if last else "")
    return re.sub(r"(<\|(?:system|user|assistant|end)\|>)\s+", r"\1", whole).removeprefix("<|assistant|>")


def deepseek(turns: Sequence[Turn], at: int) -> str:
    turn, end = turns[at], fullwidth("end of sentence")
    if not _calls(turn):
        said = turn.content.split("</think>")[-1]
        return said + end if said.strip() else ""
    (call,) = turn.extra["tool_calls"]
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    begin = fullwidth("tool calls begin") + fullwidth("tool call begin") + "function" + fullwidth("tool sep")
    closing = fullwidth("tool call end") + fullwidth("tool calls end") + end
    return f"{turn.content}{begin}weather\n```json\n{arguments}\n```{closing}"


def gptoss(turns: Sequence[Turn], at: int) -> str:
    turn, last = turns[at], at + 1 == len(turns)
    thought = turn.extra.get("thinking")
    if _calls(turn):
        thought = turn.content or thought
        later = any(other.role == "assistant" and not _calls(other) for other in turns[at + 1 :])
        (call,) = turn.extra["tool_calls"]
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        text = f" to=functions.weather<|channel|>commentary json<|message|>{arguments}<|call|>"
        return text if later or not thought else _analysis(thought) + text
    text = f"<|channel|>final<|message|>{turn.content}" + ("<|return|>" if last else "<|end|>")
    return _analysis(thought) + text if last and thought else text


def _analysis(thought: str) -> str:
    return f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"


_IM = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
_CALL_WORDS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_DEEPSEEK = (
    "end of sentence", "begin of sentence", "User", "Assistant", "tool calls begin", "tool calls end",
    "tool call begin", "tool call end", "tool sep", "tool outputs begin", "tool outputs end", "tool output begin",
    "tool output end",
)  # fmt: skip
_LLAMA = ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>")
_MISTRAL = (
    "</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)  # fmt: skip
_HARMONY = ("<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>")
_PHI3 = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

FAMILIES = {
    family.name: family
    for family in (
        Family("chatml", _IM, ends("<|im_end|>")),
        Family("llama3", _LLAMA, llama3, calls=True),
        Family("mistral", _MISTRAL, mistral, calls=True, alternates=True, system=False, kinds=("bytes", "pieces")),
        Family(
            "gemma",
            ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
            trimmed("<end_of_turn>"),
            alternates=True,
            kinds=("bytes", "pieces"),
        ),
        Family("qwen2", _IM, qwen2, calls=True, words=_CALL_WORDS[:4], kinds=("bytes", "merged", "normal")),
        Family("qwen3", _IM, qwen3, calls=True, thinks=True, words=_CALL_WORDS, kinds=("bytes", "merged", "normal")),
        Family("phi3", _PHI3, phi3, greedy=True, kinds=("bytes", "pieces")),
        Family("phi4", (*_IM, "<|im_sep|>"), ends("<|im_end|>")),
        Family(
            "deepseek",
            tuple(map(fullwidth, _DEEPSEEK)),
            deepseek,
            calls=True,
            thinks=True,
            words=("<think>", "</think>"),
        ),
        Family("gptoss", _HARMONY, gptoss, calls=True, thinks=True),
        Family("zephyr", ("</s>", "<s>"), ends("</s>"), kinds=("bytes", "merged", "pieces")),
        Family("alpaca", ("</s>", "<s>"), ends("</s>"), kinds=("bytes", "merged", "trimmed", "pieces")),
    )
}


@cache
def tokenizer_of(name: str, kind: str) -> Any:
    """Return a toy tokenizer of a family; do not change it.

    `bytes` has no merges, `merged` joins letters, blanks and line breaks across words, `trimmed` also hides blanks from
    the places it tells, `normal` composes letters (NFC), `pieces` is of SentencePiece's kind.
    """
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    backend = _pieces() if kind == "pieces" else _byte_level(merged=kind != "bytes")
    if kind == "trimmed":
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if kind == "normal":
        backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(
        [AddedToken(mark, rstrip=family.greedy and at > 0) for at, mark in enumerate(family.marks)]
    )
    backend.add_tokens([AddedToken(word, normalized=False) for word in family.words])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=family.marks[0],
        pad_token=family.marks[0],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = family.template
    return made


@cache
def _learned_merges() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    lines = [json.loads(line)["messages"] for line in ROWS.read_text(encoding="utf-8").splitlines()[:200]]
    texts = ["### Instruction:\n{}\n\n### Response:\n\n{}\n\n\n".format(*(m["content"] for m in row)) for row in lines]
    backend.train_from_iterator(texts, trainer)
    return str(backend.to_str())


def _byte_level(*, merged: bool) -> Tokenizer:
    if merged:
        backend = Tokenizer.from_str(_learned_merges())
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces() -> Tokenizer:
    """Return SentencePiece's kind: blanks are letters of their own, what is unknown falls back to bytes."""
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e"), ("i", "n"), ("\n", "\n"), ("\u2581", "\u2581")]
    letters = [chr(code) for code in range(33, 127)] + ["\n", "\u2581"]
    tokens = [f"<0x{code:02X}>" for code in range(256)] + letters + [a + b for a, b in merges]
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, merges, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend
