"""What a run made: whole weights, or an adapter with the base it belongs to."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune import rundir
from ftune.errors import Problem, RunError
from ftune.models import fingerprint, golden
from ftune.models.load import load_model, read_tokenizer
from ftune.models.quiet import quiet
from ftune.models.source import Say, damaged, refuse_pickles, silent, source_directory
from ftune.recipe.schema import Model, Recipe
from ftune.resolve.spec import RunSpec

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Finished:
    """The result of a run, on the disk."""

    folder: Path
    """`model/` of the run directory, or the folder itself where there is no run around it."""
    base: Model | None
    """What an adapter was trained on; None for whole weights."""
    model: Model
    """What to load: the base of an adapter, else the folder."""


def is_run(path: Path) -> bool:
    """Return whether a folder is a run directory."""
    return (path / rundir.RUN).is_file() or (path / rundir.MODEL).is_dir()


def of_run(directory: Path) -> Finished:
    """Return what a run directory holds; refuses one without a finished model."""
    if not directory.is_dir():
        fix = "name the training.output_dir of a run"
        raise RunError(Problem(rule="no-run", what=f"there is no run directory `{directory}`", fix=fix))
    folder = directory / rundir.MODEL
    if not is_run(directory):
        what = f"`{directory}` is not a run directory: it has no {rundir.RUN}"
        raise RunError(Problem(rule="no-run", what=what, fix="name the training.output_dir of a run"))
    if not (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        what = f"the run `{directory}` has no finished model"
        fix = f"let it finish: ftune resume {directory}"
        raise RunError(Problem(rule="no-finished-model", what=what, why=f"`{folder}` is missing", fix=fix))
    return of_folder(folder, recipe.model if (recipe := recipe_of(directory)) else None)


def of_folder(folder: Path, recipe_model: Model | None = None) -> Finished:
    """Return what a folder holds, an adapter or whole weights; its recipe knows the base best."""
    trusted = recipe_model is not None and recipe_model.trust_remote_code
    if not (folder / ADAPTER).is_file():
        return Finished(folder, None, Model(model_name_or_path=str(folder), trust_remote_code=trusted))
    base = recipe_model or _base_of(folder)
    return Finished(folder, base, base)


def load_finished(found: Finished, *, dtype: str = "auto", device_type: str = "cpu", say: Say = silent) -> Any:
    """Return the model, an adapter attached to its base without being folded in."""
    wanted = found.model.model_copy(update={"dtype": dtype, "attn_implementation": "auto"})
    check_base(found, say)
    model = load_model(wanted, device_type=device_type, say=say)
    return model if found.base is None else attach(model, found.folder)


def check_base(found: Finished, say: Say = silent) -> None:
    """Refuse a pickled adapter, and one that was trained on other weights than its base now has."""
    if found.base is not None:
        refuse_pickles(found.folder, str(found.folder))
        base = Path(source_directory(found.base, say))
        fingerprint.check(found.folder, base, found.base.model_name_or_path)


def finished_tokenizer(found: Finished, say: Say = silent) -> Any:
    """Return the tokenizer saved with the result; refuses one that no longer is what the model was trained with."""
    tokenizer = read_tokenizer(str(found.folder), trust_remote_code=found.model.trust_remote_code, say=say)
    golden.check(found.folder, tokenizer)
    return tokenizer


def attach(model: Any, folder: Path, *, assign: bool = False) -> Any:
    """Return a model with the adapter of a folder; `assign` writes into no weight of the model, but replaces it."""
    from safetensors import SafetensorError

    try:
        with quiet(), warnings.catch_warnings(record=True) as said:
            from peft import PeftModel

            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False, low_cpu_mem_usage=assign)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        if "size mismatch" in str(error):
            raise _other_shapes(folder, str(error)) from error
        raise damaged(str(folder), str(error).strip().split("\n")[0][:300]) from error
    lacking = [str(one.message) for one in said if "missing adapter keys" in str(one.message)]
    if lacking:
        # peft only warns, and leaves those parts at their random start.
        raise damaged(str(folder), lacking[0].split("\n")[0][:300])
    return adapted.eval()


def _other_shapes(folder: Path, text: str) -> RunError:
    first = next(line.strip() for line in text.splitlines() if "size mismatch" in line)
    what = f"the adapter in `{folder}` does not fit its base: its weights have other shapes"
    fix = "name the model it was trained on"
    return RunError(Problem("base-differs", what, why=first[:300], fix=fix))


def recipe_of(directory: Path) -> Recipe | None:
    """Return what a run was told to do, as far as it is a run's directory."""
    return spec_of(directory).recipe if (directory / rundir.RUN).is_file() else None


def spec_of(directory: Path) -> RunSpec:
    """Return the `run.json` of a run directory; raises RunError where it cannot be read."""
    path = directory / rundir.RUN
    try:
        return RunSpec.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = str(error).split("\n", maxsplit=1)[0]
        fix = f"restore it from a copy, or start anew from the {rundir.RECIPE} beside it"
        fix += f"; a finished model can be used without it: {directory / rundir.MODEL}"
        raise RunError(Problem(rule="run-damaged", what=f"`{path}` cannot be read", why=why, fix=fix)) from None


def _base_of(folder: Path) -> Model:
    try:
        settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        return Model(model_name_or_path=settings["base_model_name_or_path"], revision=settings.get("revision"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(str(folder / ADAPTER), f"it does not say what it was trained on: {error}") from None
