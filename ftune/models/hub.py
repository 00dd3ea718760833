"""Models of the Hugging Face hub: the copy on this disk if it is whole, else a download that fails fast.

Left to itself `from_pretrained` asks the hub again on every start, and retries for 47 s where there is no network.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftune.errors import FtuneError, Problem, RecipeError
from ftune.models.source import Say, check_weights
from ftune.recipe.schema import Model
from ftune.units import format_bytes

_TIMEOUT_SECONDS = 5.0
_TEXT_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


def folder(model: Model, say: Say) -> str:
    """Return the folder with the whole model, downloading what is missing."""
    found = _cached(model)
    if found is not None and _is_whole(found, model):
        return str(found)
    sizes = _remote_files(model)
    if model.gguf_file is not None and model.gguf_file not in sizes:
        raise _no_such_gguf(model, sizes)
    patterns = _patterns(model, sizes)
    total = sum(size for name, size in sizes.items() if any(Path(name).match(pattern) for pattern in patterns))
    say(f"downloading {model.model_name_or_path} ({format_bytes(total)})")
    return _download(model, patterns)


def _cached(model: Model) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model.model_name_or_path, revision=model.revision, local_files_only=True))
    except (OSError, HFValidationError):
        return None


def _is_whole(found: Path, model: Model) -> bool:
    if model.gguf_file is not None:
        return (found / model.gguf_file).is_file()
    try:
        check_weights(found, model.model_name_or_path)
    except FtuneError:
        return False
    return (found / "config.json").is_file()


def _patterns(model: Model, sizes: dict[str, int]) -> list[str]:
    if model.gguf_file is not None:
        return [model.gguf_file]
    has_safetensors = any(name.endswith(".safetensors") and "/" not in name for name in sizes)
    weights = "*.safetensors" if has_safetensors else "pytorch_model*.bin"
    code = ["*.py"] if model.trust_remote_code else []
    return [*_TEXT_FILES, weights, *code]


def _no_such_gguf(model: Model, sizes: dict[str, int]) -> RecipeError:
    wanted, there = str(model.gguf_file), sorted(name for name in sizes if name.endswith(".gguf"))
    near = difflib.get_close_matches(wanted, there, n=1, cutoff=0.4) or there[:1]
    fix = f"set model.gguf_file to `{near[0]}`" if near else "remove model.gguf_file, or name another model"
    more = f" and {len(there) - 8} more" if len(there) > 8 else ""
    why = f"it has {', '.join(there[:8])}{more}" if there else "it has no GGUF file"
    what = f"the model `{model.model_name_or_path}` has no file `{wanted}`"
    return RecipeError(Problem(rule="unknown-model", what=what, why=why, fix=fix))


def _remote_files(model: Model) -> dict[str, int]:
    from huggingface_hub import HfApi

    name, revision = model.model_name_or_path, model.revision
    with _explained(model):
        found = HfApi().model_info(name, revision=revision, timeout=_TIMEOUT_SECONDS, files_metadata=True)
    return {entry.rfilename: entry.size or 0 for entry in found.siblings or ()}


def _download(model: Model, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download

    from ftune.models.quiet import quiet_hub

    arguments: dict[str, Any] = {"revision": model.revision, "etag_timeout": _TIMEOUT_SECONDS}
    with _explained(model), quiet_hub():
        return str(snapshot_download(model.model_name_or_path, allow_patterns=patterns, **arguments))


@contextlib.contextmanager
def _explained(model: Model) -> Iterator[None]:
    """Turn the hub's errors into what to do about them."""
    from huggingface_hub import errors

    name = model.model_name_or_path
    try:
        yield
    except errors.GatedRepoError:
        fix = f"accept its terms at https://huggingface.co/{name}, then `hf auth login`"
        raise _problem(name, "its owner asks you to accept terms first (a gated model)", fix) from None
    except errors.RevisionNotFoundError:
        raise _problem(name, f"it has no revision `{model.revision}`", "set model.revision: null") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        why = "there is no such directory here, and no such model on the hub (or it is private)"
        fix = f"look at https://huggingface.co/models?search={name.rpartition('/')[2]}; if private: `hf auth login`"
        raise _problem(name, why, fix) from None
    except Exception as error:
        if not _is_network_error(error):
            raise
        why = f"there is no such directory here, no copy in the hub cache, and no network ({_short(error)})"
        fix = "check the spelling of a local path, or run once where there is a network (and without HF_HUB_OFFLINE)"
        raise _problem(name, why, fix) from None


def _is_network_error(error: Exception) -> bool:
    """Know them by family: the hub's HTTP library has changed its name twice."""
    families = {family.__name__ for family in type(error).__mro__}
    known = {"ConnectionError", "TransportError", "HTTPError", "TimeoutError", "LocalEntryNotFoundError"}
    return bool(families & known)


def _short(error: Exception) -> str:
    return "offline mode is on" if type(error).__name__ == "OfflineModeIsEnabled" else str(error).split("\n")[0][:120]


def _problem(name: str, why: str, fix: str) -> RecipeError:
    return RecipeError(Problem(rule="unknown-model", what=f"no model `{name}`", why=why, fix=fix))
