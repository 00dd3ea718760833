"""Write what a run ended with for other tools, then prove on the files that they say what the run says."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ftune import plugin, rundir
from ftune.errors import MachineError, Problem, RecipeError, RunError
from ftune.models import generate
from ftune.models.finished import of_run
from ftune.models.load import max_positions
from ftune.models.source import Say, silent
from ftune.places import expanded
from ftune.plugin import Conversation, Turn
from ftune.training import checkpoint
from ftune.units import format_bytes
from ftune.weights.source import Source

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(first, second):\n    return",
    "Once upon a time there was a small river that",
)
"""Asked besides the run's own samples: any text will do, the two models only have to agree on it."""

MAX_SHARD_SIZE = "5GB"
"""What the hub's own tools split at."""

_MAX_PROMPTS, _MAX_TOKENS = 4, 256


@dataclass(frozen=True)
class Exported:
    """An export that was proved."""

    directory: Path
    format: str
    dtype: str
    max_difference: float
    mean_divergence: float
    losses: tuple[float, float]
    """The mean loss of a prompt's token, in nats: said by the run's model, and by what was written."""
    tolerance: plugin.Tolerance | None
    """Of both; None where they are what rounding costs, which is told and not judged."""
    folded: float | None
    """The mean divergence of the whole weights before they were rounded; None where no adapter was folded into them, or
    nothing was rounded."""
    prompts: int
    computed: tuple[str, str]
    """In which way the run's model and the exported one answered: `in memory` or `layer by layer`."""
    read_by: str


def merge(
    run_directory: Path,
    output: Path,
    *,
    max_shard_size: str | None = None,
    free_bytes: int | None = None,
    say: Say = silent,
) -> Exported:
    """Fold the adapter of a run into its base and write the whole model, stored in the base's type."""
    found = of_run(run_directory)
    if found.base is None:
        what = f"the run `{run_directory}` has no adapter to merge"
        why, fix = "it trained the weights themselves", f"use {found.folder} as it is"
        raise RecipeError(Problem(rule="not-an-adapter", what=what, why=why, fix=fix))
    return export(
        run_directory, output, format="safetensors", max_shard_size=max_shard_size, free_bytes=free_bytes, say=say
    )


def export(
    run_directory: Path,
    output: Path,
    *,
    format: str,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    free_bytes: int | None = None,
    say: Say = silent,
) -> Exported:
    """Write a run in a format to `output`; on any failure nothing is left there.

    `dtype` None stores weights as the run's model was stored. `max_shard_size` is for formats that have shards; None
    takes the hub's. `free_bytes` is the memory that may be used, None what the system has free: a model that needs
    more in float32 is compared layer by layer.
    """
    form = _named(format)
    _require_dtype(dtype, form)
    _require_size(max_shard_size, form)
    _require_packages(form)
    output = expanded(output)
    refuse_existing(output)
    _require_writable(output)
    source = Source(run_directory, free_bytes=free_bytes, say=say)
    form.check(source)
    dtype = dtype or form.default_dtype(source)
    _require_room(output, form.bytes_needed(source, dtype))
    with source.computing() as (model, first):
        say(f"asking the run's model, {first}")
        inputs = _inputs(source, model)
        before = _logits(model, inputs)
        del model
    rounds = dtype in form.rounds
    folded = _folded(source, inputs, before, say) if rounds and source.has_adapter else None
    with _written_whole(output) as partial:
        say(f"writing {form.name} in {dtype}")
        form.write(source, partial, dtype=dtype, max_shard_size=max_shard_size or MAX_SHARD_SIZE)
        with form.computing(source, partial) as (model, second):
            say(f"asking what was written, {second}")
            after = _logits(model, inputs)
            if rounds:
                say("comparing every weight with what it was rounded from")
                form.check_rounding(source, partial, model, dtype=dtype)
            del model
        difference, divergence = _compared(before, after)
        tolerance = form.tolerances[dtype]
        _judge(f"the {form.name} files do", tolerance, difference, divergence)
    return Exported(
        directory=output,
        format=form.name,
        dtype=dtype,
        max_difference=difference,
        mean_divergence=divergence,
        losses=(_mean_loss(before, inputs), _mean_loss(after, inputs)),
        tolerance=tolerance,
        folded=folded,
        prompts=len(inputs),
        computed=(first, second),
        read_by=form.read_by,
    )


def _named(name: str) -> plugin.Export:
    known = plugin.names(plugin.EXPORTS)
    if name in known:
        return plugin.export(name)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    fix = f"did you mean `{near[0]}`? " if near else ""
    what = f"there is no export format `{name}`"
    raise RecipeError(Problem("unknown-method", what, fix=f"{fix}the formats are: {', '.join(known)}"))


def _require_dtype(dtype: str | None, form: plugin.Export) -> None:
    if dtype is not None and dtype not in form.tolerances:
        what = f"the format `{form.name}` does not store weights as `{dtype}`"
        raise RecipeError(Problem("bad-value", what, fix=f"--dtype takes {' | '.join(form.tolerances)}"))


def _require_size(text: str | None, form: plugin.Export) -> None:
    """Refuse what is no size as the hub's tools write it, and a size of shards for a format that has none."""
    if text is None:
        return
    if not form.shards:
        every = [plugin.export(name) for name in plugin.names(plugin.EXPORTS)]
        what = f"--max-shard-size has no meaning for the format `{form.name}`"
        why = "it writes all weights into one file, however large"
        fix = f"leave it out, or choose a format that has shards: {', '.join(one.name for one in every if one.shards)}"
        raise RecipeError(Problem("no-shards", what, why=why, fix=fix))
    if not re.fullmatch(r"[1-9]\d*([KMGT]B)?", text, re.IGNORECASE):
        what = f"--max-shard-size cannot be `{text}`"
        raise RecipeError(Problem("bad-value", what, fix="write it as 5GB, or 500MB"))


def _require_packages(form: plugin.Export) -> None:
    lacking = [name for name in form.needs if importlib.util.find_spec(name) is None]
    if lacking:
        what = f"the format `{form.name}` needs {' and '.join(lacking)}"
        raise MachineError(Problem("package-missing", what, fix=f"pip install {' '.join(lacking)}"))


@contextlib.contextmanager
def _written_whole(output: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes the output when everything in it is on the disk."""
    try:
        with rundir.new_directory(output.resolve()) as partial:
            yield partial
    except Exception as error:
        if not isinstance(error, OSError) and not checkpoint.out_of_room(error):
            raise
        fix = "make room, or name another --output, and try again"
        why = str(error).split("\n")[0][:300]
        problem = Problem("output-unwritable", f"could not write `{output}`; nothing was left", why=why, fix=fix)
        raise RunError(problem) from None


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
        what = "the export cannot take the place of the folder you are in"
        raise RecipeError(Problem(rule="output-exists", what=what, fix="name a folder inside it with --output"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        what, fix = f"cannot write to `{output}`", "name another --output, on a disk with room"
        raise RecipeError(Problem(rule="output-unwritable", what=what, why=str(error), fix=fix)) from None


def _require_room(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.resolve().parent).free
    if free < needed:
        what = f"the export needs {format_bytes(needed)}, and the disk of {output} has {format_bytes(free)} free"
        raise MachineError(Problem("disk-room", what, fix="free the disk, or name an --output on another one"))


def _inputs(source: Source, model: Any) -> list[torch.Tensor]:
    """Return the token ids (1, n) of the run's saved prompts, and of a few texts besides."""
    prompts = [*_sample_prompts(source.run_directory / rundir.SAMPLES), *TEXTS]
    length = min(_MAX_TOKENS, max_positions(model) or _MAX_TOKENS)
    return [generate.encode(source.tokenizer, prompt)[:, :length] for prompt in prompts]


@torch.no_grad()
def _logits(model: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the logits (n, vocabulary) of each prompt, of one forward pass: each pass may read all weights anew.

    Padding stands at the right, where what came before it does not see it.
    """
    longest = max(ids.shape[1] for ids in inputs)
    ids = torch.cat([functional.pad(row, (0, longest - row.shape[1])) for row in inputs])
    mask = torch.cat([functional.pad(torch.ones_like(row), (0, longest - row.shape[1])) for row in inputs])
    made = model.eval()(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    return [made[number, : row.shape[1]] for number, row in enumerate(inputs)]


def _mean_loss(logits: list[torch.Tensor], inputs: list[torch.Tensor]) -> float:
    pairs = zip(logits, inputs, strict=True)
    each = [functional.cross_entropy(made[:-1], ids[0, 1:], reduction="none") for made, ids in pairs]
    return torch.cat(each).mean().item()


def _compared(before: list[torch.Tensor], after: list[torch.Tensor]) -> tuple[float, float]:
    """Return the largest difference of logits and the mean divergence over all tokens; a NaN stays one in both."""
    differences, divergences = [], []
    for old, new in zip(before, after, strict=True):
        differences.append((new - old).abs().max())
        target = functional.log_softmax(old, dim=-1)
        found = functional.kl_div(functional.log_softmax(new, dim=-1), target, log_target=True, reduction="none")
        divergences.append(found.sum(dim=-1))
    return torch.stack(differences).max().item(), torch.cat(divergences).mean().item()


def _folded(source: Source, inputs: list[torch.Tensor], before: list[torch.Tensor], say: Say) -> float:
    """Return the mean divergence of the whole weights from the run's model; raises RunError where they differ."""
    say("asking the whole weights, before they are rounded")
    with source.computing_whole() as model:
        difference, divergence = _compared(before, _logits(model, inputs))
        del model
    _judge("the whole weights, not rounded yet, do", plugin.BEFORE_ROUNDING, difference, divergence)
    return divergence


def _judge(which: str, tolerance: plugin.Tolerance | None, difference: float, divergence: float) -> None:
    holds = math.isfinite(difference + divergence) if tolerance is None else tolerance.holds(difference, divergence)
    if not holds:
        what = f"{which} not say what the run's model says; nothing was kept"
        why = f"largest logit difference {difference:.3g}, mean KL {divergence:.3g}, allowed: {tolerance or 'numbers'}"
        fix = "use the run's model/ as it is, and report this with its configuration"
        raise RunError(Problem(rule="export-differs", what=what, why=why, fix=fix))


def _sample_prompts(path: Path) -> list[generate.Prompt]:
    """Return the first distinct prompts of a run's samples, texts or conversations."""
    prompts: list[generate.Prompt] = []
    for row in rundir.read_whole_lines(path):
        try:
            prompt = row["prompt"]
            if isinstance(prompt, list):
                prompt = Conversation(tuple(Turn(turn["role"], turn["content"]) for turn in prompt))
        except (KeyError, TypeError):  # an odd line is no reason not to export
            continue
        if prompt not in prompts:
            prompts.append(prompt)
    return prompts[:_MAX_PROMPTS]
