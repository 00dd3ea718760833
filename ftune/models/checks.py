"""Is it a causal language model? Answered from config.json, before gigabytes of weights are read."""

from __future__ import annotations

import difflib
from typing import Any

from ftune.errors import Problem, RecipeError

_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_FIX = "choose a decoder model such as SmolLM2, Qwen2.5 or Llama"


def check_remote_code(config: dict[str, Any], name: str, *, trusted: bool) -> None:
    """Refuse a model whose Python code would have to be run, unless the recipe trusts it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = str(config.get("model_type", ""))
    if kind in CONFIG_MAPPING_NAMES or (trusted and "auto_map" in config):
        return
    if "auto_map" in config:
        what = f"`{name}` comes with its own Python code, which would run with your rights"
        fix = "read that code; if you trust its authors, set model.trust_remote_code: true"
        raise RecipeError(Problem(rule="remote-code", what=what, why=f"no library knows `{kind}`", fix=fix))
    near = difflib.get_close_matches(kind, CONFIG_MAPPING_NAMES, n=1)
    fix = f"did you mean model_type `{near[0]}`?" if near else "pip install --upgrade transformers"
    why = f"its config.json says model_type `{kind}`" if kind else "its config.json has no model_type"
    what = f"`{name}` is of a kind that transformers does not know"
    raise RecipeError(Problem(rule="unknown-architecture", what=what, why=why, fix=fix))


def check_causal(config: Any, name: str) -> None:
    """Refuse encoders, encoder-decoders and classifiers; `config` is a transformers configuration object."""
    found = _what_it_is(config)
    if found is not None:
        what = f"`{name}` is not a causal language model: {found}"
        why = "ftune teaches a model to continue text, one token after another"
        raise RecipeError(Problem(rule="not-a-causal-lm", what=what, why=why, fix=_FIX))


def _what_it_is(config: Any) -> str | None:
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    heads = list(config.architectures or ())
    said = f" ({', '.join(heads)})" if heads else ""
    remote = getattr(config, "auto_map", None) or {}
    if getattr(config, "is_encoder_decoder", False):
        return f"`{kind}` reads with an encoder and writes with a decoder{said}"
    if kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "AutoModelForCausalLM" not in remote:
        return f"`{kind}` has no head that predicts the next token{said}"
    # Every bert-like encoder also has an *LMHeadModel class; only `is_decoder` says that it looks backwards alone.
    encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and kind not in ("xlm", "reformer")
    if encoder and not getattr(config, "is_decoder", False):
        return f"`{kind}` is an encoder that sees the words after each word, too{said}"
    expected = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    other = [head for head in heads if "For" in head and not head.endswith(_GENERATES) and head != expected]
    if heads and len(other) == len(heads):
        return f"its last layer does something else{said}"
    return None
