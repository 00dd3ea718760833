"""Rows on number formats, compilation and sharding: what holds the weights, and what computes with them."""

from __future__ import annotations

from ftune.plugin import Gradients
from ftune.rules.rule import Facts, Rule


def _pure_half(facts: Facts, dtype: str) -> bool:
    return facts.recipe.model.dtype == dtype and not facts.tuning.frozen_base


def _no_half(facts: Facts) -> bool:
    training = facts.recipe.training
    return training.bf16 is False and training.fp16 is False and facts.recipe.model.dtype in ("auto", "float32")


RULES: tuple[Rule, ...] = (
    Rule(
        id="one-precision",
        at="training.fp16",
        when=lambda f: f.recipe.training.fp16 is True and f.recipe.training.bf16 is True,
        what="bf16 and fp16 cannot both be on",
        because="a matrix product is computed in one type",
        instead="keep bf16 on Ampere and newer GPUs, fp16 on older ones, or write auto for both",
        also=(("training.bf16", "asks for bfloat16"),),
        label="asks for float16",
        bad={"training": {"bf16": True, "fp16": True}},
        good={"training": {"bf16": True, "fp16": False}},
    ),
    Rule(
        id="fp16-weights-need-bf16-or-scaler",
        at="model.dtype",
        when=lambda f: _pure_half(f, "float16"),
        what="full fine-tuning cannot hold its weights in float16",
        because="without a float32 copy there is nothing for a loss scaler to protect: the loss is NaN within steps",
        instead="set model.dtype: float32 with training.fp16: true, or model.dtype: bfloat16",
        bad={"model": {"dtype": "float16"}, "tuning": {"method": "full"}},
        good={"model": {"dtype": "bfloat16"}, "tuning": {"method": "full"}},
    ),
    Rule(
        id="fp16-trains-float32-weights",
        at="training.fp16",
        when=lambda f: f.recipe.training.fp16 is True and _pure_half(f, "bfloat16"),
        what="fp16 autocast does not go with bfloat16 weights",
        because="the loss scaler unscales float32 gradients only",
        instead="set model.dtype: float32, or fp16: false",
        bad={"model": {"dtype": "bfloat16"}, "training": {"fp16": True}},
        good={"model": {"dtype": "float32"}, "training": {"fp16": True}},
    ),
    Rule(
        id="pure-bf16-loses-small-updates",
        at="model.dtype",
        when=lambda f: (
            _pure_half(f, "bfloat16")
            and not f.tuning.copies_in_float32(f.recipe.tuning.options)
            and f.optimizer.gradients is Gradients.KEPT
            and getattr(f.recipe.optimizer.options, "rounding", "nearest") != "stochastic"
            and f.recipe.training.fp16 is not True
        ),
        what="pure bfloat16 weights lose small updates",
        because="{optim} rounds each update to 8 bits of precision: at a rate of 1e-5 the loss may not move at all",
        instead="set model.dtype: float32 with training.bf16: true, or raise the learning rate",
        severity="warning",
        bad={"model": {"dtype": "bfloat16"}, "tuning": {"method": "full"}},
        good={"model": {"dtype": "bfloat16"}, "tuning": {"method": "lora"}},
    ),
    Rule(
        id="flash-attention-needs-half-precision",
        at="model.attn_implementation",
        when=lambda f: f.flash is not None and _no_half(f),
        what="{attention} cannot compute in float32",
        because="its kernels take bfloat16 and float16 only, and both are off",
        instead="set bf16: auto, or attn_implementation: sdpa",
        also=(("training.bf16", "no bfloat16"), ("training.fp16", "no float16")),
        bad={"model": {"attn_implementation": "flash_attention_2"}, "training": {"bf16": False, "fp16": False}},
        good={"model": {"attn_implementation": "flash_attention_2"}, "training": {"bf16": True}},
    ),
    Rule(
        id="dora-breaks-compiled-graph",
        at="tuning.use_dora",
        when=lambda f: getattr(f.recipe.tuning.options, "use_dora", False) and f.recipe.training.torch_compile,
        what="DoRA is not compiled",
        because="PEFT recomputes weight norms in Python at every step, which breaks the graph",
        instead="set torch_compile: false, or use_dora: false",
        severity="warning",
        bad={"tuning": {"method": "lora", "use_dora": True}, "training": {"torch_compile": True}},
        good={"tuning": {"method": "lora", "use_dora": True}},
    ),
)
