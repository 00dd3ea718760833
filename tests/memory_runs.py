"""Traced and real training steps for tests, in a process of their own: python tests/memory_runs.py KIND JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def in_a_process(kind: str, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what each of the asked combinations gives."""
    command = [sys.executable, "-W", "ignore", __file__, kind, json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


def compare(one: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the benchmark."""
    import memory

    return memory.compare(one)  # type: ignore[no-any-return]


def depth(one: dict[str, Any]) -> dict[str, Any]:
    """Return each phase's peak by owner, of all layers traced and of a few."""
    import memory

    from ftune.memory.layers import peaks_of, peaks_of_depth, period
    from ftune.memory.traced import Asked, traced_here

    with tempfile.TemporaryDirectory() as name:
        spec, config = memory.spec_of(one, Path(name)), config_of(one)
        asked: list[int] = []

        def trace_of(layers: int) -> Any:
            asked.append(layers)
            return traced_here(Asked(spec, config, one["device"], layers=layers))

        few = peaks_of_depth(trace_of, one["layers"], every=period(config) or 0)
        every = peaks_of(traced_here(Asked(spec, config, one["device"])))
    return {"traced": asked, "few": _plain(few), "every": _plain(every)}


def turns(one: dict[str, Any]) -> dict[str, Any]:
    """Return the peak of each turn, traced and real."""
    import memory

    from ftune.memory.peak import peak
    from ftune.memory.step import Follow, Rows, steps, worst_lengths
    from ftune.memory.traced import Asked, _traced
    from ftune.memory.tracked import Tracked
    from ftune.memory.turns import COUNTED, Turn

    found: dict[str, Any] = {"traced": [], "real": [], "on_gpu": [], "host": []}
    with tempfile.TemporaryDirectory() as name:
        spec = memory.spec_of(one, Path(name))
        config = memory.make_model(one["model"], Path(name) / "model")
        count, number = 1, 0
        while number < count:
            trace, count = _traced(Asked(spec, config), number)
            on_gpu, _ = _traced(Asked(spec, config, "cuda"), number)
            model, tracked = memory.loaded(spec), Tracked()
            tracked.follow(model)
            callbacks = [
                lambda trainer, tracked=tracked: Follow(tracked, COUNTED),
                lambda trainer, tracked=tracked, number=number: Turn(trainer, tracked, number, moves=False),
            ]
            with tracked:
                steps(spec, model, Rows(worst_lengths(spec), packed=False), callbacks, count=COUNTED)
            tracked.unfollow()
            found["traced"].append(peak(trace).size_bytes)
            found["real"].append(peak(tracked.trace()).size_bytes)
            found["on_gpu"].append(peak(on_gpu).size_bytes)
            found["host"].append(on_gpu.host_bytes)
            number += 1
    return found


def config_of(one: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json of the small model with another number of layers."""
    import memory

    kind, layers = one["model"], one["layers"]
    named = {"n_layer" if kind == "gpt2" else "num_hidden_layers": layers}
    config = {**memory.MODELS[kind], "model_type": kind, **named}
    if kind == "gemma2":
        config["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    return config


def _plain(peaks: Any) -> dict[str, Any]:
    return {
        phase: {"size_bytes": one.size_bytes, **{owner.value: size for owner, size in one.by_owner.items()}}
        for phase, one in peaks.items()
    }


if __name__ == "__main__":
    for each in json.loads(sys.argv[2]):
        print(json.dumps({"compare": compare, "depth": depth, "turns": turns}[sys.argv[1]](each)), flush=True)
