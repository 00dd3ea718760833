"""What a recipe may say of LoRA."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ftune.options import Flag, Fraction, Integer, Options, Positive, Text


class LowRankOptions(Options):
    """Options of every low-rank addition, in PEFT's spelling."""

    r: Integer = Field(default=16, ge=1)
    """Rank of the addition."""
    lora_alpha: Positive = 32
    """The addition is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target_modules: Text | Annotated[list[Text], Field(min_length=1)] = "all-linear"
    """Names of the layers that get an adapter, a regular expression, or `all-linear`: all but the output layer."""


class LoRAOptions(LowRankOptions):
    """Options of LoRA, in PEFT's spelling."""

    modules_to_save: list[Text] | None = None
    """Names of layers trained in full beside the adapter, such as embed_tokens."""
    use_rslora: Flag = False
    """Scale by sqrt(r) (rank-stabilised LoRA), so that large ranks keep learning."""
    use_dora: Flag = False
    """Train magnitude and direction apart (DoRA)."""
    init_lora_weights: Flag | Literal["gaussian", "orthogonal"] = True
    """How the adapter starts; true starts at zero, so that step 0 is the base model."""
