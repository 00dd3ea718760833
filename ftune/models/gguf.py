"""GGUF files: dequantised once to an ordinary folder in the cache, because reading one takes half a minute."""

from __future__ import annotations

import contextlib
import difflib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftune.cache import cache_directory, content_hash
from ftune.errors import MachineError, Problem, RecipeError
from ftune.models.source import Say
from ftune.rundir import whole_directory
from ftune.tensor_files import damaged

_MAGIC = b"GGUF"
_LAYOUT = "v1"
"""Part of the folder's name: change it when the conversion itself changes."""


def find(folder: Path, name: str) -> Path:
    """Return the GGUF file of this name in a folder."""
    path = folder / name
    if path.is_file():
        return path
    there = sorted(entry.name for entry in folder.glob("*.gguf"))
    near = difflib.get_close_matches(name, there, n=1, cutoff=0.4) or there[:1]
    fix = f"set model.gguf_file to `{near[0]}`" if near else "remove model.gguf_file, or name another folder"
    why = f"the folder holds {', '.join(there)}" if there else "the folder holds no GGUF file"
    raise RecipeError(Problem(rule="unknown-model", what=f"no file `{name}` in `{folder}`", why=why, fix=fix))


def converted(path: Path, name: str, say: Say) -> Path:
    """Return the folder with the float32 copy of a GGUF, made now if it is not there yet."""
    from filelock import FileLock

    folder = cache_directory() / "models" / f"{Path(name).stem}-{_LAYOUT}-{content_hash(path)[:16]}"
    if folder.is_dir():
        return folder
    _require_writable(folder.parent)
    with FileLock(str(folder) + ".lock"):  # a second process waits here, then finds the copy made
        if not folder.is_dir():
            say(f"converting {name} once to {folder} (about half a minute)")
            with whole_directory(folder) as partial:
                _convert(path, partial)
    return folder


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"cannot write the converted model to `{folder}`"
        fix = "set FTUNE_CACHE to a folder you can write to"
        raise MachineError(Problem(rule="cache", what=what, why=str(error), fix=fix)) from None


def _convert(path: Path, folder: Path) -> None:
    with path.open("rb") as content:
        if content.read(4) != _MAGIC:
            raise damaged(str(path), "it does not begin as a GGUF file does")
    from transformers import AutoTokenizer

    from ftune.models.quiet import quiet

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
            model, report = read_model(path)
            model.config._name_or_path = path.stem
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except ImportError as error:
        needs = "pip install gguf" if "gguf" in str(error).lower() else "pip install accelerate"
        what = f"a package to read `{path.name}` is missing"
        raise MachineError(Problem(rule="package-missing", what=what, why=str(error), fix=needs)) from None
    except (ValueError, RuntimeError, OSError, KeyError, IndexError) as error:
        raise _explain(path, error) from error
    if report["missing_keys"]:
        raise damaged(str(path), "it lacks " + ", ".join(sorted(report["missing_keys"])[:5]))


def read_model(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model of a GGUF file, dequantised to float32, and transformers' report of what was found."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from ftune.models.quiet import quiet

    with quiet(), _no_bar():
        model, report = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            local_files_only=True,
            # Without dequantize the model keeps GGUF blocks, and save_pretrained refuses it.
            quantization_config=GgufConfig(dequantize=True),
            dtype="float32",
            output_loading_info=True,
        )
    return model, report


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """The reader's own bar listens to no switch of transformers."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = reader.tqdm
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = bar


def _explain(path: Path, error: Exception) -> Exception:
    text = str(error).strip().split("\n")[0]
    if "not supported" in text and "architecture" in text.lower():
        fix = "use the model's original safetensors instead of the GGUF"
        return RecipeError(Problem(rule="unknown-model", what=f"`{path.name}` cannot be read", why=text, fix=fix))
    return damaged(str(path), text)
