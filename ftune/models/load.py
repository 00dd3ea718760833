"""Load a tokenizer and a model from what a recipe names; refuse whatever would train something else in silence."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftune.adapters.bits import keep_differentiable
from ftune.errors import FtuneError, MachineError, Problem, RecipeError, RunError
from ftune.models.checks import check_causal, check_remote_code
from ftune.models.few_bits import load_codes
from ftune.models.quiet import quiet
from ftune.models.source import (
    Say,
    check_weights,
    config_of,
    public_name,
    refuse_pickles,
    silent,
    source_directory,
)
from ftune.recipe.schema import Model
from ftune.tensor_files import damaged

HARMLESS_EXTRAS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)$")
"""Constants that old versions saved and new ones compute."""
_INSTALLED = re.compile(r"pip install (?:-\S+ )*['\"]?([A-Za-z][\w.-]*)")
"""The package in a library's advice, past options, quotes and version."""


def load_tokenizer(model: Model, say: Say = silent) -> Any:
    """Return the tokenizer; where it has no padding token the end token stands in, which the masks never confuse."""
    folder = source_directory(model, say)
    config = config_of(Path(folder), model.model_name_or_path)
    check_remote_code(config, model.model_name_or_path, trusted=model.trust_remote_code)
    return read_tokenizer(folder, trust_remote_code=model.trust_remote_code, say=say)


def read_tokenizer(folder: str, *, trust_remote_code: bool = False, say: Say = silent) -> Any:
    """Return the tokenizer of a folder, which may be an adapter's and so have no config.json."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except ImportError as error:
        raise _package_missing(error) from None
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise _no_tokenizer(folder, error) from error
    lacking = tokenizer.pad_token is None
    if lacking:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        say("the tokenizer has no padding token: padding with its first token, which is never learnt as such")
    elif lacking:
        say(f"the tokenizer has no padding token: padding with `{tokenizer.pad_token}`, which is never learnt as such")
    return tokenizer


def load_model(
    model: Model, *, device_type: str = "cpu", say: Say = silent, quantization: Mapping[str, Any] | None = None
) -> Any:
    """Return the causal language model with every weight taken from the files, none made up.

    `quantization` holds its linear layers in fewer bits: arguments of transformers' BitsAndBytesConfig.
    """
    from transformers import AutoConfig

    name = model.model_name_or_path
    folder = source_directory(model, say)
    check_remote_code(config_of(Path(folder), name), name, trusted=model.trust_remote_code)
    if not model.trust_remote_code:
        refuse_pickles(Path(folder), name)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=model.trust_remote_code, local_files_only=True
            )
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise damaged(str(Path(folder) / "config.json"), _first_line(error)) from error
    check_causal(config, name)
    check_weights(Path(folder), name)
    loaded = _read_weights(model, folder, config, device_type, quantization)
    keep_differentiable(loaded)
    spoken = public_name(model)
    loaded.name_or_path = loaded.config._name_or_path = spoken or folder  # what an adapter remembers as its base
    loaded.weights_folder = folder
    # What is quantised is on its device already, and what was quantised to 8 bits refuses to be moved.
    return loaded if getattr(loaded, "is_quantized", False) else loaded.to(_device(device_type))


def max_positions(model: Any) -> int | None:
    """Return the longest sequence the model was made for; None where it does not say."""
    config = model.config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _read_weights(
    model: Model, folder: str, config: Any, device_type: str, quantization: Mapping[str, Any] | None
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    arguments: dict[str, Any] = (
        {} if model.attn_implementation == "auto" else {"attn_implementation": model.attn_implementation}
    )
    if quantization is not None:
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(**quantization)
    if quantization is not None or getattr(config, "quantization_config", None) is not None:
        arguments["device_map"] = {"": _device(device_type)}
    try:
        coded = load_codes(model, Path(folder), config)
        if coded is not None:
            _check_report(coded[1], model.model_name_or_path)
            return coded[0]
        with quiet():
            loaded, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=model.dtype,
                trust_remote_code=model.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with names, instead of a bare RuntimeError
                **arguments,
            )
    except ImportError as error:
        raise _package_missing(error) from None
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, MemoryError) as error:
        raise _explain_failure(model, folder, error) from error
    _check_report(report, model.model_name_or_path)
    return loaded


def _explain_failure(model: Model, folder: str, error: Exception) -> FtuneError:
    text = _first_line(error)
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        fix = "close other programs, choose a smaller model, or set model.dtype: bfloat16"
        what = f"there is no memory left to load `{model.model_name_or_path}`"
        return MachineError(Problem(rule="out-of-memory", what=what, why=text, fix=fix))
    if "attn" in text or "attention" in text.lower():
        key = f"model.attn_implementation: {model.attn_implementation}"
        fix = "set model.attn_implementation: auto"
        return RecipeError(Problem(rule="attention-unsupported", what=f"`{key}` does not work", why=text, fix=fix))
    return damaged(folder, text)


def _check_report(report: dict[str, Any], name: str) -> None:
    """Refuse what transformers only warns of: it fills missing weights with random numbers."""
    missing = sorted(report["missing_keys"])
    extra = sorted(key for key in report["unexpected_keys"] if not HARMLESS_EXTRAS.search(key))
    mismatched = sorted(f"{key} {tuple(had)} instead of {tuple(want)}" for key, had, want in report["mismatched_keys"])
    parts = [
        f"{words}: {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
        for words, keys in (("missing", missing), ("of another shape", mismatched), ("not part of the model", extra))
        if keys
    ]
    if parts or report["error_msgs"]:
        raise RunError(
            Problem(
                rule="weights-do-not-fit",
                what=f"the weight files of `{name}` do not fit its config.json",
                why="; ".join(parts) or str(report["error_msgs"][0]),
                fix="use the config.json that belongs to these weights; ftune does not start from made-up numbers",
            )
        )


def _device(device_type: str) -> torch.device:
    if device_type == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(device_type)


def _package_missing(error: ImportError) -> MachineError:
    names = _INSTALLED.findall(str(error)) or ([error.name] if error.name else [])
    fix = f"pip install {names[0]}" if names else "install the package it names"
    return MachineError(
        Problem(rule="package-missing", what="a package this model needs is missing", why=_first_line(error), fix=fix)
    )


def _no_tokenizer(folder: str, error: Exception) -> RecipeError:
    what = f"`{folder}` has no tokenizer that can be read"
    fix = f"put the tokenizer's files (tokenizer.json, tokenizer_config.json) into `{folder}`"
    return RecipeError(Problem(rule="no-tokenizer", what=what, why=_first_line(error), fix=fix))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
