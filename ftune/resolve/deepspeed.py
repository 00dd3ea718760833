"""The only file that writes DeepSpeed's JSON: what a ZeRO stage means, spelled out.

`configs/deepspeed/*.json` are its standard forms, printed by `python -m ftune.resolve.deepspeed FOLDER` and pinned by a
test. Values of "auto" are filled in by Hugging Face's Trainer and by accelerate from their own settings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STANDARD = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3_offload": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
}
"""File name: arguments of `zero_config`."""


def zero_config(*, stage: int, offload_optimizer: str = "none", offload_param: str = "none") -> dict[str, Any]:
    """Return the DeepSpeed configuration of a ZeRO stage (Rajbhandari et al., 2020); offload is to `cpu` or `none`."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": offload_optimizer, "pin_memory": True}
    if stage == 3:
        if offload_param != "none":
            zero["offload_param"] = {"device": offload_param, "pin_memory": True}
        # Without gathering, what is saved are each rank's empty placeholders.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        zero |= dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto")
    zero["reduce_bucket_size"] = "auto"
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    }


def text(name: str) -> str:
    """Return the text of one standard file."""
    return json.dumps(zero_config(**STANDARD[name]), indent=2) + "\n"  # type: ignore[arg-type]


def main() -> None:
    """Write the standard files into the folder named on the command line."""
    for name in STANDARD:
        (Path(sys.argv[1]) / f"{name}.json").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
