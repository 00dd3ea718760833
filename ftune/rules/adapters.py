"""Rows on adapters: how they start, at what rates they learn, and what holds the base below them."""

from __future__ import annotations

from ftune.plugin import Gradients
from ftune.rules.rule import Facts, Rule


def _option(facts: Facts, key: str) -> object:
    return getattr(facts.recipe.tuning.options, key, None)


def _widths(facts: Facts) -> int:
    """Return how many widths of a quantised base are asked for; 4 bits are not, where only 8 are named."""
    four = _option(facts, "load_in_4bit") is True
    eight = _option(facts, "load_in_8bit") is True
    return int(eight) + int(four and not (eight and "tuning.load_in_4bit" not in facts.given))


def _computes_in_float16(facts: Facts) -> bool:
    dtype = _option(facts, "bnb_4bit_compute_dtype")
    return dtype == "float16" or (dtype == "auto" and facts.recipe.training.fp16 is True)


def _is_begun(facts: Facts) -> bool:
    """Whether an adapter that is there already is told how to begin."""
    return _option(facts, "adapter") is not None and "tuning.init_lora_weights" in facts.given


RULES: tuple[Rule, ...] = (
    Rule(
        id="one-width",
        at="tuning.load_in_4bit",
        when=lambda f: f.tuning.quantises and _option(f, "load_in_4bit") is not None and _widths(f) != 1,
        what="the base is held either in 4 bits or in 8",
        because="{tuning} quantises it to one width, and load_in_4bit and load_in_8bit ask for both or for none",
        instead="remove load_in_4bit or load_in_8bit; to quantise nothing set tuning.method: lora",
        also=(("tuning.load_in_8bit", "and this"),),
        bad={"tuning": {"method": "qlora", "load_in_4bit": True, "load_in_8bit": True}},
        good={"tuning": {"method": "qlora", "load_in_8bit": True}},
    ),
    Rule(
        id="four-bit-settings-unused",
        at="tuning.load_in_8bit",
        when=lambda f: (
            _option(f, "load_in_8bit") is True
            and any(key.startswith("tuning.bnb_4bit_") for key in f.given)
            and _widths(f) == 1
        ),
        what="settings of 4-bit bases would be ignored",
        because="load_in_8bit: true holds the base in 8 bits, which knows no bnb_4bit_ key",
        instead="remove load_in_8bit, or the keys that begin with bnb_4bit_",
        severity="warning",
        bad={"tuning": {"method": "qlora", "load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}},
        good={"tuning": {"method": "qlora", "bnb_4bit_quant_type": "nf4"}},
    ),
    Rule(
        id="loftq-needs-four-bits",
        at="tuning.init_lora_weights",
        when=lambda f: f.tuning.fits_rounded_base(f.recipe.tuning.options) and _option(f, "load_in_8bit") is True,
        what="LoftQ is for bases of 4 bits",
        because="LLM.int8 multiplies large inputs in 16 bits: what its codes leave out is not what it computes with",
        instead="remove load_in_8bit, or set init_lora_weights: true",
        also=(("tuning.load_in_8bit", "asks for 8"),),
        bad={"tuning": {"method": "qlora", "init_lora_weights": "loftq", "load_in_8bit": True}},
        good={"tuning": {"method": "qlora", "init_lora_weights": "loftq"}},
    ),
    Rule(
        id="four-bits-in-float16",
        at="tuning.bnb_4bit_compute_dtype",
        when=lambda f: f.tuning.quantises and _computes_in_float16(f) and _option(f, "load_in_8bit") is not True,
        what="4-bit bases computed in float16 do not always learn",
        because="QLoRA's authors finish about 80 of 100 such runs at 7B: activations overflow float16",
        instead="set bnb_4bit_compute_dtype: bfloat16 (Ampere and newer GPUs), or float32, which is slower",
        also=(("training.fp16", "computes in float16"),),
        severity="warning",
        bad={"tuning": {"method": "qlora", "bnb_4bit_compute_dtype": "float16"}},
        good={"tuning": {"method": "qlora", "bnb_4bit_compute_dtype": "bfloat16"}},
    ),
    Rule(
        id="start-rounds-the-base",
        at="model.dtype",
        when=lambda f: (
            f.tuning.takes_from_base(f.recipe.tuning.options) and f.recipe.model.dtype in ("bfloat16", "float16")
        ),
        what="the saved adapter would not quite fit the base",
        because="it starts with a part of the weights, and what is left of them is rounded to 16 bits while training",
        instead="set model.dtype: float32, for 2 more bytes a weight; or init_lora_weights: true",
        also=(("tuning.init_lora_weights", "takes a part out of the weights"),),
        severity="warning",
        bad={"tuning": {"method": "lora", "init_lora_weights": "pissa"}, "model": {"dtype": "bfloat16"}},
        good={"tuning": {"method": "lora", "init_lora_weights": "pissa"}, "model": {"dtype": "float32"}},
    ),
    Rule(
        id="one-rate-for-all",
        at="tuning.loraplus_lr_ratio",
        when=lambda f: _option(f, "loraplus_lr_ratio") is not None and f.optimizer.gradients is Gradients.NONE,
        what="{optim} moves all weights at one rate",
        because="it measures one number for all of them together, and LoRA+ wants another rate for B",
        instead="remove loraplus_lr_ratio, or set an optim that makes gradients, such as adamw_torch",
        also=(("training.optim", "has one rate"),),
        bad={
            "tuning": {"method": "lora", "loraplus_lr_ratio": 16},
            "training": {"optim": "mezo", "optim_args": {"eps": 1e-2}},
        },
        good={"tuning": {"method": "lora", "loraplus_lr_ratio": 16}},
    ),
    Rule(
        id="adapter-is-begun",
        at="tuning.init_lora_weights",
        when=_is_begun,
        what="init_lora_weights would be ignored",
        because="tuning.adapter names an adapter that goes on from where it is",
        instead="remove init_lora_weights, or tuning.adapter",
        also=(("tuning.adapter", "is there already"),),
        bad={"tuning": {"method": "lora", "adapter": "runs/a/model", "init_lora_weights": "gaussian"}},
        good={"tuning": {"method": "lora", "adapter": "runs/a/model"}},
    ),
)
