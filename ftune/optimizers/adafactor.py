"""Adafactor (Shazeer and Stern, 2018), Hugging Face's implementation, with the settings that work for fine-tuning."""

from __future__ import annotations

from typing import Any

from ftune.options import FactoredOptions, Flag, Fraction
from ftune.plugin import Optimizer, Setting, TrainedTensor


class AdafactorOptions(FactoredOptions):
    """Options of Adafactor."""

    beta1: Fraction | None = None
    """Decay of a first moment; null keeps none, otherwise 4 bytes per weight."""
    scale_parameter: Flag = False
    """Multiply the step by the weights' own root mean square."""


class Adafactor(Optimizer):
    name = "adafactor"
    summary = "AdamW's quality with one row and one column of statistics per matrix."
    computes = "adafactor"
    state_bytes_per_parameter = 0.0
    state_bytes_note = "4 bytes per row and per column of a matrix, 4 per element of a vector"
    default_learning_rate = 5e-5
    learning_rate_reason = "the usual range for decoder models; 1e-3 is for T5-like ones"
    default_max_grad_norm = 0.0
    max_grad_norm_reason = "Adafactor clips each tensor's update itself (clip_threshold)"
    Options = AdafactorOptions

    def state_bytes(self, tensor: TrainedTensor, options: Any) -> float:
        """Return the bytes of the statistics, and of a first moment where there is one."""
        return float(options.statistics_bytes(tensor.shape) + (4 * tensor.elements if options.beta1 is not None else 0))

    def build(self, groups: list[dict[str, Any]], *, learning_rate: float, options: Any, setting: Setting) -> Any:
        from transformers.optimization import Adafactor as HuggingFaceAdafactor

        from ftune.fused.kept import keep_state_dtypes

        class ResumableAdafactor(HuggingFaceAdafactor):
            """Hugging Face's, whose float32 statistics stay so when they are loaded."""

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                super().load_state_dict(state_dict)
                keep_state_dtypes(self, state_dict)

        return ResumableAdafactor(
            groups,
            lr=learning_rate,
            eps=options.eps,
            clip_threshold=options.clip_threshold,
            decay_rate=options.decay_rate,
            beta1=options.beta1,
            scale_parameter=options.scale_parameter,
            relative_step=False,
            warmup_init=False,
        )


plugin = Adafactor()
