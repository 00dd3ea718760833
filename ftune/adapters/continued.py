"""Adapters that were made before, here or elsewhere, to go on training or to use."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ftune.adapters.rounding import require_rounded, rounding_of
from ftune.errors import Problem, RecipeError, RunError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def continued(model: Any, folder: str, kind: str) -> Any:
    """Return the model with a saved adapter that is trained on; `kind` is PEFT's name of what it has to be.

    Raises FtuneError where it is something else, or does not fit the model.
    """
    from peft import PeftConfig

    if not (Path(folder) / CONFIG).is_file():
        what = f"tuning.adapter: `{folder}` holds no {CONFIG}"
        raise RecipeError(Problem("adapter-folder", what, fix="name a folder that PEFT's save_pretrained wrote"))
    if not (Path(folder) / WEIGHTS).is_file():
        what = f"tuning.adapter: `{folder}` holds no {WEIGHTS}"
        why = "a Python pickle, the other form of an adapter, can run any code when it is read"
        fix = "if you trust its author, load it with peft and save it again, which writes safetensors"
        raise RecipeError(Problem("adapter-folder", what, why=why, fix=fix))
    config = PeftConfig.from_pretrained(folder)
    if config.peft_type != kind:
        what = f"tuning.adapter: `{folder}` holds an adapter of another method, {config.peft_type.value}"
        raise RecipeError(Problem("adapter-folder", what, fix=f"name one of {kind}, or set its tuning.method"))
    start = str(getattr(config, "init_lora_weights", True))
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        what = f"the adapter in `{folder}` belongs to a base that {start} changed"
        why = "it was saved without that base: on the weights as they are it would count its beginning twice"
        fix = "convert it: PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), as ftune saves it"
        raise RecipeError(Problem("adapter-folder", what, why=why, fix=fix))
    require_rounded(model, Path(folder))
    adapted = attached(model, folder, trained=True)
    adapted.fits_rounded_base = rounding_of(Path(folder)) is not None
    return adapted


def attached(model: Any, folder: str, *, trained: bool, kinds: tuple[type, ...] = (), assign: bool = False) -> Any:
    """Return the model with the adapter of a folder; raises RunError where files and model do not go together.

    `kinds` are those of layers that PEFT does not know by itself. `assign` writes into no weight of the model, but
    replaces it.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    from ftune.adapters.pooled import accept

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(folder)
            for kind in kinds:
                accept(config, kind)
            adapted = PeftModel.from_pretrained(
                model, folder, is_trainable=trained, config=config, low_cpu_mem_usage=assign
            )
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        if "size mismatch" in str(error):
            raise _other_shapes(folder, str(error)) from error
        raise _unfit(folder, str(error).strip().split("\n")[0][:300]) from error
    # peft only warns, and leaves those parts at their random start.
    lacking = [str(one.message) for one in said if "missing adapter keys" in str(one.message)]
    if lacking:
        raise _unfit(folder, lacking[0].split("\n")[0][:300])
    return adapted


def _other_shapes(folder: str, text: str) -> RunError:
    first = next(line.strip() for line in text.splitlines() if "size mismatch" in line)
    what = f"the adapter in `{folder}` does not fit its base: its weights have other shapes"
    fix = "name the model it was trained on"
    return RunError(Problem("base-differs", what, why=first[:300], fix=fix))


def _unfit(folder: str, why: str) -> RunError:
    what = f"the adapter in `{folder}` is damaged, or was made for another model"
    return RunError(Problem("weights-damaged", what, why=why, fix="name the base it was trained on, or copy it again"))
