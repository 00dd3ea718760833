"""What a recipe may say of LoRA and its relatives, in PEFT's spelling."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from ftune.options import Flag, Fraction, Integer, Options, Positive, Text

Count = Annotated[Integer, Field(ge=1)]
Index = Annotated[Integer, Field(ge=0)]
Names = Annotated[list[Text], Field(min_length=1)]


class TargetOptions(Options):
    """Where an adapter goes."""

    target_modules: Text | Names = "all-linear"
    """Names of the layers that get an adapter, a regular expression, or `all-linear`: all but the output layer."""


class LowRankOptions(TargetOptions):
    """Options of every low-rank addition, in PEFT's spelling."""

    r: Count = 16
    """Rank of the addition."""
    lora_alpha: Positive = 32
    """The addition is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input."""


class PlaceOptions(TargetOptions):
    """Where an adapter goes among layers that PEFT knows, and what is trained beside it."""

    layers_to_transform: Annotated[list[Index], Field(min_length=1)] | None = None
    """Numbers of the layers that get an adapter, from 0; null is all of them."""
    layers_pattern: Text | None = None
    """What the model calls its list of layers, where that is neither `layers` nor `h`."""
    modules_to_save: Names | None = None
    """Names of layers trained in full beside the adapter, such as embed_tokens."""
    adapter: Text | None = None
    """A folder with a PEFT adapter to go on training, on the base it belongs to; what it was made with is taken from
    it, so that the recipe need not repeat it."""


class AdapterOptions(PlaceOptions, LowRankOptions):
    """Options that LoRA and QLoRA share."""

    exclude_modules: Text | Names | None = None
    """Names of layers, or a regular expression, that get none although `target_modules` names them."""
    rank_pattern: dict[Text, Count] = Field(default_factory=dict)
    """Other ranks for some layers, by name or regular expression."""
    alpha_pattern: dict[Text, Positive] = Field(default_factory=dict)
    """Other values of lora_alpha for some layers, by name or regular expression."""
    use_rslora: Flag = False
    """Scale by sqrt(r) (rank-stabilised LoRA), so that large ranks keep learning."""
    use_dora: Flag = False
    """Train magnitude and direction apart (DoRA)."""
    trainable_token_indices: Annotated[list[Index], Field(min_length=1)] | None = None
    """Ids of tokens whose embeddings are trained too, such as those of added special tokens."""
    loraplus_lr_ratio: Annotated[Positive, Field(ge=1)] | None = None
    """How many times faster than A the factor B learns (LoRA+); 16 is customary. null trains both at one rate."""
    loraplus_lr_embedding: Positive = 1e-6
    """The learning rate of adapters on embeddings, with loraplus_lr_ratio."""
    eva_batches: Count = 16
    """With init_lora_weights: eva, how many batches of training rows are looked at before the first step."""
    eva_rho: Annotated[Positive, Field(ge=1)] = 2.0
    """With init_lora_weights: eva, a layer gets a rank of up to eva_rho * r, taken from layers that explain less."""
    eva_tau: Annotated[Fraction, Field(gt=0)] = 0.99
    """With init_lora_weights: eva, how alike directions of two batches must be for a layer to be done."""


def _quick_pissa(value: str) -> str:
    if not re.fullmatch("pissa_niter_[0-9]+", value):
        raise PydanticCustomError("start", "pissa_niter_ with a number")
    return value


class LoRAOptions(AdapterOptions):
    """Options of LoRA, in PEFT's spelling."""

    init_lora_weights: (
        Flag | Literal["gaussian", "orthogonal", "eva", "pissa", "olora"] | Annotated[str, AfterValidator(_quick_pissa)]
    ) = True
    """How the adapter starts: true and `gaussian` at zero, so that step 0 is the base model; `pissa` (its quick form
    `pissa_niter_4`) and `olora` with a part of the weights, taken out of them; `eva` with directions of the data."""


class VeRAOptions(PlaceOptions):
    """Options of VeRA, in PEFT's spelling."""

    r: Count = 256
    """Rank of the shared matrices; a higher one costs little, for only r + out numbers a layer are trained."""
    d_initial: Positive = 0.1
    """What the vector between the matrices starts with; the one after them starts at zero."""
    vera_dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    projection_prng_key: Annotated[Integer, Field(ge=0)] = 0
    """The seed of the shared matrices, which are saved with the adapter."""


class QLoRAOptions(AdapterOptions):
    """Options of QLoRA, in the spelling of PEFT and of transformers' BitsAndBytesConfig."""

    init_lora_weights: Flag | Literal["gaussian", "orthogonal", "eva", "loftq"] = True
    """How the adapter starts: true at zero; `loftq` with what quantising took from the weights; `eva` with directions
    of the data. `pissa` and `olora` change the weights, so they need the unquantised ones: tuning.method: lora."""
    load_in_4bit: Flag = True
    """Hold the linear layers of the base in 4 bits."""
    load_in_8bit: Flag = False
    """Hold them in 8 bits instead (LLM.int8)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values: `nf4` has quantiles of a normal distribution, `fp4` small floating-point numbers."""
    bnb_4bit_use_double_quant: Flag = True
    """Quantise the scales of the blocks, too: 4.127 bits a weight instead of 4.5."""
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What matrix products are computed in; `auto` is what the rest of the model computes in."""
    bnb_4bit_quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] = "uint8"
    """The type of the tensors that the 4-bit codes are packed in; only sharding (FSDP) asks for another."""
    llm_int8_threshold: Positive = 6.0
    """With load_in_8bit, inputs above this are multiplied in 16 bits."""
    llm_int8_skip_modules: Names | None = None
    """Names of layers that are not quantised; null leaves out the output layer."""

    def quantization(self) -> dict[str, object]:
        """Return arguments of transformers' BitsAndBytesConfig."""
        if self.load_in_8bit:
            given: dict[str, object] = {"load_in_8bit": True, "llm_int8_threshold": self.llm_int8_threshold}
        else:
            # Undecided, as in a run made with nothing to compute in: what BitsAndBytesConfig itself would take.
            dtype = "float32" if self.bnb_4bit_compute_dtype == "auto" else self.bnb_4bit_compute_dtype
            given = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
                "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
                "bnb_4bit_compute_dtype": dtype,
                "bnb_4bit_quant_storage": self.bnb_4bit_quant_storage,
            }
        return {**given, "llm_int8_skip_modules": self.llm_int8_skip_modules}
