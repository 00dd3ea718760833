"""QA-LoRA (Xu et al., 2023, arXiv 2309.14717): an adapter over groups of a base in few bits, which merges exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ftune import rundir
from ftune.adapters.options import Count, LowRankOptions
from ftune.errors import Problem, RecipeError
from ftune.options import Integer, Positive
from ftune.plugin import Batches, Tuning, no_batches


class QALoRAOptions(LowRankOptions):
    """Options of QA-LoRA."""

    r: Count = 64
    """Rank of the addition."""
    lora_alpha: Positive = 16
    """The addition is scaled by lora_alpha / r."""
    bits: Literal[2, 3, 4, 8] = 4
    """Bits of a weight of the base."""
    group_size: Integer = Field(default=32, ge=1)
    """Consecutive inputs that share a scale and an offset; has to divide the inputs of every layer."""
    fit: Literal["minmax", "hqq", "gptq"] = "gptq"
    """How the codes are found: `minmax` rounds to nearest, `hqq` forgives outliers, `gptq` (the paper's) weighs errors
    by what the layers read in calibration rows, and takes minutes."""
    calibration_rows: Integer = Field(default=128, ge=1)
    """Training rows that `gptq` looks at."""


class QALoRA(Tuning):
    name = "qalora"
    summary = "Adapters over groups of inputs are trained beside a base in 2 to 8 bits, and merge into it exactly."
    split_note = "codes of few bits are not split: every device has to hold all of them"
    has_adapter = True
    frozen_base = True
    takes_codes = True
    default_learning_rate = 2e-5
    learning_rate_reason = "the paper's: the adapter reads sums over groups, which are larger than single inputs"
    Options = QALoRAOptions

    def prepare(
        self,
        model: Any,
        options: Any,
        *,
        directory: Path,
        batches: Batches,
        say: Callable[[str], None],
    ) -> Any:
        from filelock import FileLock

        from ftune.adapters.targets import check_names, matched
        from ftune.quantized.files import read_codes, write_codes
        from ftune.quantized.model import codes_of, linear_layers, put_codes, quantized_layers, require_all_groups

        own = dict(quantized_layers(model))
        layers = own or linear_layers(model)
        model.is_quantized = False  # what an adapter over groups trains upon, it may be
        check_names(model, options)
        matched(model, options, layers)
        path = directory / rundir.CODES
        # One rank fits the codes, the others read them: every rank has the same, and so has a resumed run.
        with FileLock(directory / rundir.CODES_LOCK):
            if path.exists():
                put_codes(model, read_codes(path))
                return model
            if own:
                _agree(options, own)
                say(f"training upon the codes that the model has, of {len(own)} layers")
            else:
                require_all_groups(layers, options.group_size)
                self._fit(model, list(layers), options, batches, say)
            write_codes(path, codes_of(model))
        return model

    def _fit(self, model: Any, names: list[str], options: Any, batches: Batches, say: Callable[[str], None]) -> None:
        from ftune.blocks import blocks_of
        from ftune.quantized.calibration import quantise_sequentially
        from ftune.quantized.half_quadratic import fit_half_quadratic
        from ftune.quantized.minmax import fit_minmax
        from ftune.quantized.model import quantise

        bits, group_size = options.bits, options.group_size
        say(f"quantising {len(names)} layers to {bits} bits in groups of {group_size}, by {options.fit}")
        if options.fit == "gptq":
            calibration = batches(options.calibration_rows, rows=1)
            quantise_sequentially(
                model, blocks_of(model), names, calibration, bits=bits, group_size=group_size, say=say
            )
        else:
            fit = {"minmax": fit_minmax, "hqq": fit_half_quadratic}[options.fit]
            quantise(model, names, lambda weight: fit(weight, bits, group_size))

    def apply(self, model: Any, options: Any, *, batches: Batches) -> Any:
        from ftune.adapters.pooled import add_pooled_lora
        from ftune.adapters.targets import matched
        from ftune.quantized.linear import QuantizedLinear
        from ftune.quantized.model import quantized_layers

        names = matched(model, options, dict(quantized_layers(model)))
        return add_pooled_lora(model, names, options, over=QuantizedLinear)

    def without_numbers(self, model: Any, options: Any) -> Any:
        from ftune.quantized.minmax import fit_minmax
        from ftune.quantized.model import linear_layers, quantise, quantized_layers

        if not dict(quantized_layers(model)):
            # Whatever the fit, its codes, scales and offsets have these shapes.
            quantise(model, linear_layers(model), lambda weight: fit_minmax(weight, options.bits, options.group_size))
        return self.apply(model, options, batches=no_batches)

    def group_of_inputs(self, options: Any) -> int | None:
        return int(options.group_size)

    def fingerprint(self, model: Any) -> str | None:
        from ftune.quantized.files import fingerprint
        from ftune.quantized.model import codes_of

        return fingerprint(codes_of(model.get_base_model()))

    def save(self, model: Any, folder: Path, *, directory: Path) -> None:
        from ftune.quantized.files import copy_codes

        super().save(model, folder, directory=directory)
        copy_codes(directory / rundir.CODES, folder / rundir.CODES)


def _agree(options: Any, layers: dict[str, Any]) -> None:
    """Refuse a recipe that asks for other codes than the model has: they would be made from rounded weights."""
    for key in ("bits", "group_size"):
        wanted = getattr(options, key)
        name = next((name for name, layer in layers.items() if getattr(layer.codes, key) != wanted), None)
        if key in options.model_fields_set and name is not None:
            found = getattr(layers[name].codes, key)
            what = f"tuning.{key}: {wanted} is not what this model was quantised with: `{name}` has {found}"
            fix = f"leave tuning.{key} out, or start from the unquantised model"
            raise RecipeError(Problem("codes-differ", what, fix=fix))


plugin = QALoRA()
