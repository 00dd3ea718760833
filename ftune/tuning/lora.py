"""LoRA (Hu et al., 2021): a small low-rank addition beside frozen weights, through PEFT."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field

from ftune.errors import Problem, RecipeError
from ftune.options import Flag, Fraction, Integer, Options, Positive, Text
from ftune.plugin import Tuning


class LoRAOptions(Options):
    """Options of LoRA, in PEFT's spelling."""

    r: Integer = Field(default=16, ge=1)
    """Rank of the addition."""
    lora_alpha: Positive = 32
    """The addition is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target_modules: Text | Annotated[list[Text], Field(min_length=1)] = "all-linear"
    """Names of the layers that get an adapter, a regular expression, or `all-linear`: all but the output layer."""
    modules_to_save: list[Text] | None = None
    """Names of layers trained in full beside the adapter, such as embed_tokens."""
    use_rslora: Flag = False
    """Scale by sqrt(r) (rank-stabilised LoRA), so that large ranks keep learning."""
    use_dora: Flag = False
    """Train magnitude and direction apart (DoRA)."""
    init_lora_weights: Flag | Literal["gaussian", "orthogonal"] = True
    """How the adapter starts; true starts at zero, so that step 0 is the base model."""


class LoRA(Tuning):
    name = "lora"
    summary = "Low-rank adapters are trained beside frozen weights."
    has_adapter = True
    frozen_base = True
    default_learning_rate = 2e-4
    learning_rate_reason = "adapters start at zero and are small: the customary rate for LoRA"
    Options = LoRAOptions

    def apply(self, model: Any, options: Any) -> Any:
        from peft import LoraConfig, TaskType, get_peft_model

        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=options.r,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=options.target_modules,
            modules_to_save=options.modules_to_save,
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
            init_lora_weights=options.init_lora_weights,
        )
        _check_names(model, options)
        model.requires_grad_(False)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise RecipeError(_refused(model, options.target_modules, str(error))) from None
        for weight in adapted.parameters():
            # Copies of whole layers (modules_to_save) come in the base's dtype, where small updates are lost.
            if weight.requires_grad and weight.dtype.itemsize < 4:
                weight.data = weight.data.float()
        return adapted


def _check_names(model: Any, options: LoRAOptions) -> None:
    """Refuse each name that is no layer: PEFT passes over one as long as another matches."""
    layers = {name for name, _ in model.named_modules()}
    ends = {name.rpartition(".")[2] for name in layers}
    for key in ("target_modules", "modules_to_save"):
        wanted = getattr(options, key)
        for name in wanted if isinstance(wanted, list) else ():
            if not any(layer == name or layer.endswith("." + name) for layer in layers):
                near = difflib.get_close_matches(name, ends, n=1)
                fix = f"did you mean {near[0]}?" if near else _linear_layers(model)
                raise RecipeError(Problem("lora-targets", f"tuning.{key}: this model has no layer `{name}`", fix=fix))


def _refused(model: Any, wanted: str | list[str], why: str) -> Problem:
    """Say which layers there are: PEFT's own message does not."""
    first = why.split("\n", maxsplit=1)[0]
    if "arget modules" not in first:
        return Problem("lora-options", "PEFT refuses these options of lora", why=first, fix="`ftune explain lora`")
    what = f"no adapter can be put on {wanted!r}"
    return Problem("lora-targets", what, why=first, fix=_linear_layers(model) + "; or write target_modules: all-linear")


def _linear_layers(model: Any) -> str:
    import torch

    layers = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return "this model's linear layers are " + ", ".join(sorted(layers))


plugin = LoRA()
