"""Fold an adapter into its base, then prove on the saved files that the result says what the adapter said."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ftune import rundir
from ftune.adapters.pooled import fold_pooled
from ftune.errors import Problem, RecipeError, RunError
from ftune.models import generate, golden
from ftune.models.finished import finished_tokenizer, load_finished, of_run
from ftune.models.load import load_model, max_positions, read_tokenizer
from ftune.models.quiet import quiet
from ftune.models.source import Say, config_of, silent, source_directory
from ftune.places import expanded
from ftune.plugin import Conversation, Turn
from ftune.quantized.linear import QuantizedLinear
from ftune.quantized.model import codes_of, dequantised
from ftune.recipe.schema import Model
from ftune.training import checkpoint

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(first, second):\n    return",
    "Once upon a time there was a small river that",
)
"""Asked besides the run's own samples: any text will do, the two models only have to agree on it."""

MAX_DIFFERENCE = 1e-3
"""Largest difference of a logit that float32 may show: sums in another order give about 1e-4."""
MAX_DIVERGENCE = {torch.bfloat16: 2e-3, torch.float16: 1e-4}
"""Largest mean Kullback-Leibler divergence, in nats, where merged weights are rounded to 16 bits: ten times what
a SmolLM2-135M with a strong adapter shows."""

_MAX_PROMPTS, _MAX_TOKENS = 4, 256


@dataclass(frozen=True)
class Merged:
    """A merge that was proved."""

    directory: Path
    dtype: str
    max_difference: float
    mean_divergence: float
    prompts: int


def merge(run_directory: Path, output: Path, say: Say = silent) -> Merged:
    """Write the merged model to `output`; on any failure nothing is left there."""
    found = of_run(run_directory)
    if found.base is None:
        what = f"the run `{run_directory}` has no adapter to merge"
        why, fix = "it trained the weights themselves", f"use {found.folder} as it is"
        raise RecipeError(Problem(rule="not-an-adapter", what=what, why=why, fix=fix))
    output = expanded(output)
    refuse_existing(output)
    _require_writable(output)
    tokenizer = finished_tokenizer(found)
    dtype = stored_dtype(Path(source_directory(found.base, say)), found.base.model_name_or_path)
    say("loading the base in float32 and attaching the adapter")
    adapted = load_finished(found, dtype="float32", say=say)
    _require_plain_weights(adapted, found.base.model_name_or_path)
    prompts = [*_sample_prompts(run_directory / rundir.SAMPLES), *TEXTS]
    length = min(_MAX_TOKENS, max_positions(adapted) or _MAX_TOKENS)
    inputs = [generate.encode(tokenizer, prompt)[:, :length] for prompt in prompts]
    before = [_logits(adapted, ids) for ids in inputs]
    whole = _fold(adapted)
    del adapted
    with _written_whole(output) as partial:
        say(f"saving in {_name(dtype)}")
        _save(whole.to(dtype), tokenizer, partial)
        del whole
        golden.copy(found.folder, partial)
        golden.check(partial, read_tokenizer(str(partial), trust_remote_code=found.model.trust_remote_code))
        say("loading what was saved and comparing it with the adapter")
        difference, divergence = _compare(partial, found.base, inputs, before)
        _judge(dtype, difference, divergence)
    return Merged(output, _name(dtype), difference, divergence, len(prompts))


@contextlib.contextmanager
def _written_whole(output: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes the output when everything in it is on the disk."""
    try:
        with rundir.new_directory(output.resolve()) as partial:
            yield partial
    except Exception as error:
        if not isinstance(error, OSError) and not checkpoint.out_of_room(error):
            raise
        fix = "make room, or name another --output, and merge again"
        why = str(error).split("\n")[0][:300]
        problem = Problem("output-unwritable", f"could not write `{output}`; nothing was left", why=why, fix=fix)
        raise RunError(problem) from None


def _require_plain_weights(adapted: Any, name: str) -> None:
    """Refuse a base stored in fewer bits: what training moved is smaller than its steps."""
    base = adapted.get_base_model()
    if getattr(base, "is_quantized", False) and not codes_of(base):
        why = "its weights are quantised, and adding the adapter to them would round most of it away"
        fix = f"use the adapter on it as it is, or train one on the unquantised weights of `{name}` and merge that"
        what = f"the adapter cannot be merged into its base `{name}`"
        raise RecipeError(Problem(rule="base-quantised", what=what, why=why, fix=fix))


def refuse_existing(output: Path) -> None:
    """Refuse to write where something is already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = f"`{output}` exists and is not empty"
        fix = "name another --output, or remove it first"
        raise RecipeError(Problem(rule="output-exists", what=what, fix=fix))


def _require_writable(output: Path) -> None:
    """Refuse what cannot be written to, before minutes are spent on loading."""
    target = output.resolve()
    if target == Path.cwd():
        what = "the merged model cannot take the place of the folder you are in"
        raise RecipeError(Problem(rule="output-exists", what=what, fix="name a folder inside it with --output"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        what, fix = f"cannot write to `{output}`", "name another --output, on a disk with room"
        raise RecipeError(Problem(rule="output-unwritable", what=what, why=str(error), fix=fix)) from None


def stored_dtype(folder: Path, name: str) -> torch.dtype:
    """Return what a model's weights are stored in: as its configuration says, else as the first tensor is."""
    config = config_of(folder, name)
    said = config.get("dtype") or config.get("torch_dtype")
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if said in named:
        return named[said]
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                kind = tensors.get_slice(key).get_dtype()
                return {"BF16": torch.bfloat16, "F16": torch.float16}.get(kind, torch.float32)
    return torch.float32


def _fold(adapted: Any) -> Any:
    if codes_of(adapted.get_base_model()):
        return dequantised(fold_pooled(adapted, over=QuantizedLinear))
    try:
        with quiet():
            return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # safe_merge found a number that is none
        fix = "look at the run's loss: it may have diverged; resume from an earlier checkpoint"
        problem = Problem(rule="merge-broken", what="the adapter cannot be merged", why=str(error), fix=fix)
        raise RunError(problem) from error


def _save(whole: Any, tokenizer: Any, folder: Path) -> None:
    with quiet():
        whole.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _compare(folder: Path, base: Model, inputs: list[torch.Tensor], before: list[torch.Tensor]) -> tuple[float, float]:
    """Return the largest difference of logits and the mean divergence between the adapter and the saved model."""
    saved = Model(model_name_or_path=str(folder), dtype="float32", trust_remote_code=base.trust_remote_code)
    fresh = load_model(saved)
    differences, divergences = [], []
    for ids, old in zip(inputs, before, strict=True):
        new = _logits(fresh, ids)
        differences.append((new - old).abs().max())
        target = functional.log_softmax(old, dim=-1)
        found = functional.kl_div(functional.log_softmax(new, dim=-1), target, log_target=True, reduction="none")
        divergences.append(found.sum(dim=-1).flatten())
    return torch.stack(differences).max().item(), torch.cat(divergences).mean().item()  # a NaN stays one in both


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return made.float()


def _judge(dtype: torch.dtype, difference: float, divergence: float) -> None:
    limit = MAX_DIVERGENCE.get(dtype)
    # Written so that a NaN fails too.
    fine = difference <= MAX_DIFFERENCE if limit is None else divergence <= limit
    if not fine:
        allowed = f"{MAX_DIFFERENCE:g} in a logit" if limit is None else f"{limit:g} in mean KL"
        what = "the merged model does not say what the adapter says; nothing was kept"
        why = f"largest logit difference {difference:.3g}, mean KL {divergence:.3g}, allowed: {allowed}"
        fix = "use the adapter unmerged, and report this with the run's adapter_config.json"
        raise RunError(Problem(rule="merge-differs", what=what, why=why, fix=fix))


def _sample_prompts(path: Path) -> list[generate.Prompt]:
    """Return the first distinct prompts of a run's samples, texts or conversations."""
    prompts: list[generate.Prompt] = []
    for row in rundir.read_whole_lines(path):
        try:
            prompt = row["prompt"]
            if isinstance(prompt, list):
                prompt = Conversation(tuple(Turn(turn["role"], turn["content"]) for turn in prompt))
        except (KeyError, TypeError):  # an odd line is no reason not to merge
            continue
        if prompt not in prompts:
            prompts.append(prompt)
    return prompts[:_MAX_PROMPTS]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
