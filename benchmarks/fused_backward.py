"""Updates inside backward beside the same updates over kept gradients: seconds per step, and gradients alive.

    python benchmarks/fused_backward.py [--steps N] [--rounds N]

A Llama of about 600 tensors (66 layers, hidden size 256, 2 rows of 64 tokens), where what is done for each tensor counts
most. The sides take turns within one process: torch.optim.SGD beside LOMO, Hugging Face's Adafactor beside AdaLomo. Both
sides know the norm of the gradients, as a trainer that logs it does. Printed are medians and their ratio.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.optimization import Adafactor

from ftune import plugin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}")
    scaled = {"scale_parameter": True, "relative_step": False, "warmup_init": False, "beta1": None}
    pairs: list[tuple[str, str, Callable[[Any], Any]]] = [
        ("lomo", "torch SGD", lambda weights: torch.optim.SGD(weights, lr=1e-3)),
        ("adalomo", "Adafactor", lambda weights: Adafactor(weights, lr=1e-3, decay_rate=-0.8, **scaled)),
    ]
    for name, other, build in pairs:
        seconds: dict[str, list[float]] = {name: [], other: []}
        for _ in range(options.rounds):
            seconds[name] += fused(name, options.steps)
            seconds[other] += kept(build, options.steps)
        ours, theirs = statistics.median(seconds[name]), statistics.median(seconds[other])
        print(f"{name:<10} {ours:.4f} s   {other:<10} {theirs:.4f} s   ratio {ours / theirs:.3f}")


def made() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 66, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_key_value_heads=4, **shape))
    return model, torch.randint(0, 1000, (2, 64))


def fused(name: str, steps: int) -> list[float]:
    model, ids = made()
    found = plugin.optimizer(name)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    optimizer = found.build(groups, learning_rate=1e-3, options=found.Options(), setting=plugin.Setting())

    def step() -> None:
        optimizer.backward(model(input_ids=ids, labels=ids).loss)
        float(optimizer.grad_norm)
        optimizer.step()

    return timed(step, steps)


def kept(build: Callable[[Any], Any], steps: int) -> list[float]:
    model, ids = made()
    optimizer = build(model.parameters())

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = [weight.grad for weight in model.parameters()]
        float(torch.nn.utils.get_total_norm(gradients))
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, steps)


def timed(step: Callable[[], None], steps: int) -> list[float]:
    for _ in range(2):
        step()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
