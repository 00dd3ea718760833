"""Predicted bytes of a training step beside those of a real one on this machine's CPU.

    python benchmarks/memory.py [--only TEXT] [--out FILE]

Each combination runs on a small random model: traced without weights from its config.json;
trained for two steps from its files under the same tracker; and trained again under torch.profiler, whose allocator
events know nothing of the tracker (they also see what kernels use inside). Prints a Markdown table of the peaks of the
second step.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMALL = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160, "max_position_embeddings": 512}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, **HEADS, **ENDS, "tie_word_embeddings": False},
    "qwen3": {**SMALL, **HEADS, **ENDS, "tie_word_embeddings": True},
    "gemma2": {**SMALL, **HEADS, **ENDS, "sliding_window": 64},
    "gpt2": {"vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, **ENDS},
}
PRECISIONS = {
    "float32": {"model": {"dtype": "float32"}, "training": {"bf16": False}},
    "bf16": {"training": {"bf16": True}},
    "pure": {"model": {"dtype": "bfloat16"}, "training": {"bf16": False}},
}
TUNINGS = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "r": 8, "target_modules": "all-linear"},
    "qlora": {"method": "qlora", "r": 8, "target_modules": "all-linear"},
    "qalora": {"method": "qalora", "r": 8, "group_size": 32, "fit": "minmax"},
    "dora": {"method": "lora", "r": 8, "target_modules": "all-linear", "use_dora": True},
}
OPTIMIZERS = ("adamw_torch", "adafactor", "adamw_8bit", "lomo", "adalomo", "adamw_fused_backward", "mezo")
LENGTH, BATCH = 256, 2
EACH = 2
"""Models for each tuning and optimizer."""
_TOGETHER = 8
"""Combinations in one process, which imports once."""
_IMPOSSIBLE = {("qalora", "gpt2")}
"""Its layers are no nn.Linear."""


def combinations() -> list[dict[str, Any]]:
    """Return every tuning with every optimizer; models and the other choices are drawn by chance."""
    rest = list(itertools.product(PRECISIONS, (False, True), (1, 2)))
    chance, found = random.Random(1), []
    for tuning, optimizer in itertools.product(TUNINGS, OPTIMIZERS):
        fitting = [name for name in MODELS if (tuning, name) not in _IMPOSSIBLE]
        models, choices = chance.sample(fitting, EACH), chance.sample(rest, EACH)
        for model, (precision, checkpointed, accumulated) in zip(models, choices, strict=True):
            found.append(
                {
                    "model": model,
                    "tuning": tuning,
                    "optimizer": optimizer,
                    "precision": precision,
                    "checkpointed": checkpointed,
                    "accumulated": accumulated,
                }
            )
    return found


def name_of(one: dict[str, Any]) -> str:
    words = [one["model"], one["tuning"], one["optimizer"], one["precision"]]
    words += ["ckpt"] * one["checkpointed"] + ["x2"] * (one["accumulated"] == 2)
    return " ".join(words)


def spec_of(one: dict[str, Any], folder: Path) -> Any:
    """Return the resolved recipe of a combination, over a model and rows made in a folder, changed by `more`."""
    from ftune.machine import probe
    from ftune.recipe import load
    from ftune.resolve import resolve

    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    precision = PRECISIONS[one["precision"]]
    fused = one["optimizer"] in ("lomo", "adalomo", "adamw_fused_backward")
    accumulated = {"gradient_accumulation_steps": one["accumulated"]}
    more = {"optim_args": {"accumulate": "forward"}} if fused and one["accumulated"] > 1 else {}
    recipe = {
        "model": {
            "model_name_or_path": str(folder / "model"),
            "attn_implementation": "eager" if one["model"] == "gemma2" else "sdpa",
            **precision.get("model", {}),
        },
        "data": {"train": str(rows), "max_length": LENGTH},
        "tuning": one.get("tunings") or TUNINGS[one["tuning"]],
        "training": {
            "output_dir": str(folder / "run"),
            "per_device_train_batch_size": BATCH,
            "optim": one["optimizer"],
            "gradient_checkpointing": one["checkpointed"],
            "sample_prompts": [],
            **accumulated,
            **more,
            **precision["training"],
        },
    }
    for section, values in one.get("more", {}).items():
        recipe[section] = {**recipe.get(section, {}), **values}
    return resolve(load(recipe), probe())


def make_model(kind: str, folder: Path) -> dict[str, Any]:
    """Write a random model and return its config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind]))
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def loaded(spec: Any) -> Any:
    """Return the model with its weights, tuned as the recipe says."""
    from ftune import plugin
    from ftune.models.load import load_model
    from ftune.models.quiet import quiet

    recipe = spec.recipe
    tuning, options = plugin.tuning(recipe.tuning.method), recipe.tuning.options
    model = load_model(recipe.model, device_type="cpu", quantization=tuning.quantization(options))
    home = Path(recipe.training.output_dir)
    home.mkdir(exist_ok=True)
    with quiet():
        model = tuning.prepare(model, options, directory=home, batches=plugin.no_batches, say=lambda line: None)
        return tuning.apply(model, options, batches=plugin.no_batches)


def tracked_run(spec: Any, lengths: tuple[int, ...] = ()) -> Any:
    """Return the trace of a real step, and of an evaluation where the recipe has one."""
    from ftune.memory.step import Follow, Rows, evaluated_rows, steps, worst_lengths
    from ftune.memory.tracked import Tracked

    model = loaded(spec)
    tracked = Tracked()
    tracked.follow(model)
    try:
        with tracked:
            evaluated = evaluated_rows(spec)
            follow = Follow(tracked, evaluates=evaluated is not None)
            rows = Rows(lengths or worst_lengths(spec), packed=spec.recipe.data.packing)
            steps(spec, model, rows, [lambda trainer: follow], eval_rows=evaluated)
    finally:
        tracked.unfollow()
    return tracked.trace()


def allocator_run(spec: Any, lengths: tuple[int, ...] = ()) -> int:
    """Return the peak of a real step by the allocator's events, over what tensors hold when it begins."""
    import torch
    from transformers import TrainerCallback

    from ftune.memory.step import Rows, evaluated_rows, steps, worst_lengths

    peaks: list[int] = []
    already = live_bytes()  # hooks on weights may keep the model of another run

    class Profile(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 1:
                self.before = live_bytes() - already
                cpu = [torch.profiler.ProfilerActivity.CPU]
                self.profile = torch.profiler.profile(activities=cpu, profile_memory=True)
                self.profile.__enter__()

        def on_step_end(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 2 and evaluated is None:
                self.end()

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            self.end()

        def end(self) -> None:
            self.profile.__exit__(None, None, None)
            events = sorted(self.profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
            changes = [event.nbytes() for event in events if event.name() == "[memory]"]
            peaks.append(self.before + max(itertools.accumulate(changes)))

    model, evaluated = loaded(spec), evaluated_rows(spec)
    rows = Rows(lengths or worst_lengths(spec), packed=spec.recipe.data.packing)
    steps(spec, model, rows, [lambda trainer: Profile()], eval_rows=evaluated)
    return peaks[0]


def live_bytes() -> int:
    """Return the bytes of all tensors that Python knows."""
    import torch

    gc.collect()
    found: dict[int, int] = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and type(value).__name__ != "FakeTensor" and not value.is_meta:
            for tensor in (value, value.grad) if value.is_leaf else (value,):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def compare(one: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one combination."""
    from ftune.errors import FtuneError
    from ftune.memory.peak import peak, phases
    from ftune.memory.traced import Asked, traced_here

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            spec = spec_of(one, folder)
        except FtuneError as error:
            return {**one, "refused": str(error.problems[0].rule)}
        config = make_model(one["model"], folder / "model")
        lengths = tuple(one.get("lengths", ()))
        allocated = allocator_run(spec, lengths)
        real, traced = tracked_run(spec, lengths), traced_here(Asked(spec, config, lengths=lengths))
    measured, predicted = peak(real), peak(traced)
    return {
        **one,
        "predicted_bytes": predicted.size_bytes,
        "tracked_bytes": measured.size_bytes,
        "allocator_bytes": allocated,
        "owners_agree": predicted.by_owner == measured.by_owner,
        "phases_agree": phases(traced) == phases(real),
        "phases": list(phases(traced)),
        "phase": predicted.phase,
        "module": predicted.module,
        "operation": predicted.operation,
        "owners": {owner.value: size for owner, size in predicted.by_owner.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="combinations whose name has this text")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory.jsonl")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # JSON, a list of combinations
    options = parser.parse_args()
    if options.one:
        for one in json.loads(options.one):
            print(json.dumps(compare(one)), flush=True)
        return
    print("| combination | predicted MiB | tracked | allocator | peak in |\n|---|---|---|---|---|", flush=True)
    known = _measured(options.out)
    wanted = [one for one in combinations() if options.only in name_of(one)]
    for start in range(0, len(wanted), _TOGETHER):
        for found in _in_a_process(wanted[start : start + _TOGETHER]):
            print(_row(found), flush=True)
            if "predicted_bytes" in found:
                known[name_of(found)] = found
        lines = (known[name_of(one)] for one in combinations() if name_of(one) in known)
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _measured(path: Path) -> dict[str, dict[str, Any]]:
    """Return what was measured before, by its name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {name_of(one): one for one in map(json.loads, lines)}


def _in_a_process(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(some)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1][:200]
        found += [{**one, "failed": why} for one in some[len(found) :]]
    return found


def _row(found: dict[str, Any]) -> str:
    name = name_of(found)
    if "predicted_bytes" not in found:
        return f"| {name} | {found.get('refused') or found['failed']} | | | |"
    predicted = found["predicted_bytes"]
    apart = [f"{predicted / found[key] - 1:+.3%}" for key in ("tracked_bytes", "allocator_bytes")]
    differs = [f"{what} differ" for what in ("owners", "phases") if not found[f"{what}_agree"]]
    apart[0] += f" ({', '.join(differs)})" if differs else ""
    return f"| {name} | {predicted / 2**20:.3f} | {apart[0]} | {apart[1]} | {found['phase']} |"


if __name__ == "__main__":
    main()
