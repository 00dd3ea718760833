"""What a run made: whole weights, or an adapter with the base it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune import plugin, rundir
from ftune.adapters.bits import dequantised
from ftune.adapters.continued import CONFIG as ADAPTER
from ftune.adapters.continued import attached
from ftune.adapters.rounding import rounding_of, tell
from ftune.data.detect import reads_plain_text
from ftune.errors import Problem, RunError
from ftune.models import fingerprint, golden
from ftune.models.load import load_model, read_tokenizer
from ftune.models.quiet import quiet
from ftune.models.source import Say, refuse_pickles, silent, source_directory
from ftune.quantized.files import read_codes
from ftune.quantized.linear import QuantizedLinear
from ftune.quantized.model import put_codes
from ftune.recipe.schema import Model, Recipe
from ftune.resolve.spec import RunSpec
from ftune.tensor_files import damaged


@dataclass(frozen=True)
class Finished:
    """The result of a run, on the disk."""

    folder: Path
    """`model/` of the run directory, or the folder itself where there is no run around it."""
    base: Model | None
    """What an adapter was trained on; None for whole weights."""
    model: Model
    """What to load: the base of an adapter, else the folder."""
    quantization: Mapping[str, Any] | None = None
    """How the base was held in fewer bits while the adapter was trained: arguments of BitsAndBytesConfig."""
    fits_rounded_base: bool = False
    """Whether the adapter makes up for what quantising took, and so belongs on no other base."""

    @property
    def is_coded(self) -> bool:
        """Whether the adapter was trained on codes that are kept beside it."""
        return (self.folder / rundir.CODES).is_file()


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
    return of_folder(folder, recipe_of(directory))


def of_folder(folder: Path, recipe: Recipe | None = None) -> Finished:
    """Return what a folder holds, an adapter or whole weights; its recipe knows the base best."""
    trusted = recipe is not None and recipe.model.trust_remote_code
    if not (folder / ADAPTER).is_file():
        return Finished(folder, None, Model(model_name_or_path=str(folder), trust_remote_code=trusted))
    rounding = rounding_of(folder)
    if recipe is None:
        base = _base_of(folder)
        return Finished(folder, base, base, rounding, rounding is not None)
    tuning, options = plugin.tuning(recipe.tuning.method), recipe.tuning.options
    rounded = rounding is not None or tuning.fits_rounded_base(options)
    return Finished(folder, recipe.model, recipe.model, tuning.quantization(options), rounded)


def write_finished(model: Any, tokenizer: Any, recipe: Recipe, folder: Path, *, directory: Path) -> None:
    """Write what a run ended with: weights or adapter, tokenizer and template, and what tells their base.

    `directory` is the run's.
    """
    plugin.tuning(recipe.tuning.method).save(model, folder, directory=directory)
    tokenizer.save_pretrained(folder)
    golden.write(folder, tokenizer, plain=reads_plain_text(recipe.data))
    write_base(model, folder, recipe)


def write_base(model: Any, folder: Path, recipe: Recipe) -> None:
    """Write into an adapter's folder what tells its base, and whether it belongs to that as it was rounded."""
    if not (folder / ADAPTER).is_file():
        return
    tuning, options, name = plugin.tuning(recipe.tuning.method), recipe.tuning.options, recipe.model.model_name_or_path
    # One that goes on belongs to what it belonged to before.
    rounded = tuning.fits_rounded_base(options) or getattr(model, "fits_rounded_base", False)
    rounding = tuning.quantization(options) if rounded else None
    fingerprint.write(folder, Path(source_directory(recipe.model)), name, rounding=rounding)
    if rounding is not None:
        tell(folder, name, rounding)


def load_finished(
    found: Finished, *, dtype: str = "auto", device_type: str = "cpu", say: Say = silent, as_trained: bool = False
) -> Any:
    """Return the model, an adapter attached to its base without being folded in.

    The base has the weights of its files, to be merged with; `as_trained` holds it in fewer bits where training did.
    An adapter that makes up for what quantising took gets what the codes stand for, which is what it was trained on.
    """
    wanted = found.model.model_copy(update={"dtype": dtype, "attn_implementation": "auto"})
    check_base(found, say)
    bits = found.quantization if as_trained or found.fits_rounded_base else None
    model = load_model(wanted, device_type=device_type, say=say, quantization=bits)
    if bits is not None and not as_trained:
        model = dequantised(model)
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
    kinds: tuple[type, ...] = ()
    if (folder / rundir.CODES).is_file():
        put_codes(model, read_codes(folder / rundir.CODES))
        kinds = (QuantizedLinear,)
    with quiet():
        return attached(model, str(folder), trained=False, kinds=kinds, assign=assign).eval()


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
