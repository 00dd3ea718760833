"""A step that runs out of memory and is made again in smaller passes, against runs that had small ones from the start.

No GPU is here: a hook in the model's forward or backward raises the exception that a GPU raises, and one test takes
real memory away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from short_of_memory import room_for
from training_runs import losses, metrics, recipe, rows_file, same_bits, weights

import ftune
from ftune.errors import RunError
from ftune.machine import probe
from ftune.training import resuming, run
from ftune.training.passes import split

ROOT = Path(__file__).parents[2]
LARGE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
SMALL = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
SGD = {"optim": "sgd", "learning_rate": 0.05}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 30 rows: the last step of an epoch has 6 of them, its last batch 2."""
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 30)


def values(model: Path, rows: Path, output: Path, training: dict[str, Any], **more: Any) -> dict[str, Any]:
    settings = {"on_out_of_memory": "shrink", "num_train_epochs": 2, **training}
    return recipe(model, rows, output, training=settings, **more)


def farthest(first: dict[str, Any], second: dict[str, Any]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def decision(done: Any) -> dict[str, Any]:
    made = json.loads((Path(done.directory) / "run.json").read_text())["decisions"]
    found: dict[str, Any] = next(one for one in made if one["key"] == "passes_per_batch")
    return found


@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_shrunk_at_the_first_step_has_the_bits_of_the_smaller_batch(
    tiny_model: Path, rows: Path, tmp_path: Path, inside: str
) -> None:
    # Dropout, so that the random numbers of the failed passes would show.
    tuning = {"method": "lora", "r": 4, "lora_dropout": 0.2}
    with room_for(2, after=1, inside=inside) as passes:
        shrunk = ftune.train(values(tiny_model, rows, tmp_path / "shrunk", LARGE, tuning=tuning))
    small = ftune.train(values(tiny_model, rows, tmp_path / "small", SMALL, tuning=tuning))
    # The first micro-batch went well, the second did not: both again, in halves.
    assert passes[:6] == [4, 4, 2, 2, 2, 2]
    assert 4 not in passes[2:]
    assert same_bits(weights(shrunk.directory), weights(small.directory))
    # Of two passes the losses are added up in float32, and of two batches in float64.
    assert losses(shrunk.directory) == pytest.approx(losses(small.directory), rel=1e-6)
    for key in ("steps", "tokens", "supervised_tokens"):
        assert getattr(shrunk, key) == getattr(small, key)
    assert decision(shrunk)["value"] == {"1": 2}
    assert {line["passes_per_batch"] for line in metrics(shrunk.directory)} == {2}


def test_shrunk_later_is_the_plain_loop_with_smaller_batches_from_there_on(
    tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    # Steps 1 and 2 take four passes of four rows, step 3 fails in its second.
    settings = {**LARGE, **SGD, "lr_scheduler_type": "constant", "max_grad_norm": 0, "num_train_epochs": 1}
    with room_for(2, after=5, inside="backward") as passes:
        shrunk = ftune.train(values(tiny_model, rows, tmp_path / "shrunk", settings))
    assert passes == [4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2, 2]
    expected = _plain_loop(tiny_model, rows, [[4, 4], [4, 4], [2, 2, 2, 2], [2, 2, 2]])
    whole = ftune.train(values(tiny_model, rows, tmp_path / "whole", settings))
    assert farthest(weights(shrunk.directory), expected) < 1e-6
    assert farthest(weights(shrunk.directory), weights(whole.directory)) < 1e-6
    assert farthest(weights(shrunk.directory), _start(tiny_model)) > 1e-2
    assert [line.get("passes_per_batch") for line in metrics(shrunk.directory)] == [None, None, 2, 2]
    made = decision(shrunk)
    assert made["value"] == {"3": 2}
    assert "per_device_train_batch_size: 2 with gradient_accumulation_steps: 4" in made["why"]


def _start(model: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(model / "model.safetensors"))


def _plain_loop(model: Path, rows: Path, steps: list[list[int]]) -> dict[str, Any]:
    """Train with SGD on the rows in accelerate's order, each step's summed loss divided by its learned tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model).train()
    lines = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    generator = torch.Generator()
    generator.manual_seed(42)
    order = iter(torch.randperm(len(lines), generator=generator).tolist())
    for sizes in steps:
        batches = [[_row(tokenizer, lines[next(order)]) for _ in range(size)] for size in sizes]
        learned = sum(label != -100 for batch in batches for _, labels in batch for label in labels)
        for batch in batches:
            longest = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([ids + [2] * (longest - len(ids)) for ids, _ in batch])
            labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch])
            mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
            logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].flatten(0, 1)
            (torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / learned).backward()
        with torch.no_grad():
            for weight in network.parameters():
                weight -= 0.05 * weight.grad
                weight.grad = None
    return {name: weight.detach() for name, weight in network.named_parameters()}


def _row(tokenizer: Any, turns: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    question = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    prompt, reply, end = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (question, turns[1]["content"] + "<|im_end|>", "\n")
    )
    return prompt + reply + end, [-100] * len(prompt) + reply + [-100] * len(end)


def test_halved_until_it_fits_and_refused_where_a_row_is_too_much(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = {**LARGE, "max_steps": 2}
    with room_for(1) as passes:
        ones = ftune.train(values(tiny_model, rows, tmp_path / "ones", settings))
    assert passes[:3] == [4, 2, 1]
    assert set(passes[2:]) == {1}
    assert decision(ones)["value"] == {"1": 4}
    with room_for(0), pytest.raises(RunError, match="no memory left, in forward and backward at step 1") as refused:
        ftune.train(values(tiny_model, rows, tmp_path / "none", settings))
    assert "in 4 passes" in refused.value.problems[0].why
    assert "per_device_train_batch_size" not in refused.value.problems[0].fix


def test_packed_rows_are_parted_between_documents(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    def packed(name: str, **training: Any) -> Any:
        settings = {"per_device_train_batch_size": 1, **SGD, "num_train_epochs": 1, **training}
        return ftune.train(values(tiny_model, rows, tmp_path / name, settings, data={"packing": True}))

    whole = packed("whole")
    made: list[list[int]] = []

    def lengths(module: Any, arguments: Any) -> None:
        if type(module).__name__ == "Embedding" and module.training and torch.is_grad_enabled():
            made.append(list(arguments[0].shape))
            if arguments[0].shape[1] > 200:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(lengths)
    try:
        shrunk = packed("shrunk")
    finally:
        handle.remove()
    assert max(length for _, length in made) > 200
    assert farthest(weights(shrunk.directory), weights(whole.directory)) < 1e-6
    assert farthest(weights(shrunk.directory), _start(tiny_model)) > 1e-2


def test_a_part_is_what_the_collator_would_have_made() -> None:
    from ftune.data.collate import Collator

    made = [{"input_ids": list(range(length)), "labels": list(range(length))} for length in (5, 9, 3, 2, 7)]
    collator = Collator(0)
    for passes, size in ((1, 5), (2, 3), (4, 2), (8, 1)):
        parts = split(collator(made), passes, 5)
        expected = [collator(made[start : start + size]) for start in range(0, 5, size)]
        assert len(parts) == len(expected)
        for part, other in zip(parts, expected, strict=True):
            assert part.keys() == other.keys()
            assert all(torch.equal(part[name], other[name]) for name in part)


def run_short(limits: dict[str, Any], *arguments: str | Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run ftune with limits to its memory, on so many ranks."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [str(ROOT / "tests" / "short_of_memory.py"), json.dumps(limits), *map(str, arguments)]
    start = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *start, *command], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def written(folder: Path, name: str, made: dict[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def resume(directory: Path, *changes: str) -> None:
    """Go on with a run as `ftune resume` does."""
    continued = resuming.reopen(directory, changes, probe())
    run.train(continued.spec, plain=True, checkpoint=continued.checkpoint)


def test_killed_and_resumed_has_the_bits_of_a_run_that_was_not(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = {**LARGE, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    tuning = {"method": "lora", "r": 4, "lora_dropout": 0.2}
    with room_for(2, after=5, inside="backward", until=6) as passes:
        whole = ftune.train(values(tiny_model, rows, tmp_path / "whole", settings, tuning=tuning))
    # The passes of step 3: one that goes well, one that fails, and all again; it is killed in the last of them.
    assert passes[4:10] == [4, 4, 2, 2, 2, 2]
    path = written(tmp_path, "killed", values(tiny_model, rows, tmp_path / "killed", settings, tuning=tuning))
    limits = {"rows": 2, "after": 5, "inside": "backward", "until": 6, "kill_at": 10}
    assert run_short(limits, "train", path).returncode == -9
    assert [each.name for each in (tmp_path / "killed" / "checkpoints").iterdir()] == ["checkpoint-2"]
    # Nothing runs short of memory now: what the run had come to is in its run.json.
    resume(tmp_path / "killed")
    assert same_bits(weights(tmp_path / "killed"), weights(whole.directory))
    assert losses(tmp_path / "killed") == losses(whole.directory)


def test_a_run_that_stopped_for_memory_goes_on_with_less(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = {**LARGE, **SGD, "save_strategy": "steps", "save_steps": 1}
    whole = ftune.train(values(tiny_model, rows, tmp_path / "whole", settings))
    stops = values(tiny_model, rows, tmp_path / "stopped", {**settings, "on_out_of_memory": "stop"})
    with room_for(2, after=2), pytest.raises(RunError) as stopped:
        ftune.train(stops)
    (problem,) = stopped.value.problems
    assert problem.what == "this machine has no memory left, in forward and backward at step 2"
    assert problem.why.startswith("rows of ")
    assert "set per_device_train_batch_size: 2 with gradient_accumulation_steps: 4" in problem.fix
    advised = f"ftune resume {tmp_path / 'stopped'} --set training.on_out_of_memory=shrink"
    assert advised in problem.fix
    with room_for(2) as passes:
        resume(tmp_path / "stopped", "training.on_out_of_memory=shrink")
    assert passes[:4] == [4, 2, 2, 2]
    assert farthest(weights(tmp_path / "stopped"), weights(whole.directory)) < 1e-6


def test_told_to_stop_a_run_keeps_the_passes_it_came_to(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = {**LARGE, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    with room_for(2):
        ftune.train(values(tiny_model, rows, tmp_path / "run", settings))
    with room_for(2) as passes:
        resume(tmp_path / "run", "training.on_out_of_memory=stop", "training.max_steps=2")
    assert set(passes) == {2}
    with room_for(1), pytest.raises(RunError, match="in forward and backward at step 3"):
        resume(tmp_path / "run", "training.max_steps=3")


@pytest.mark.slow
def test_ranks_shrink_together(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = {**LARGE, **SGD, "per_device_train_batch_size": 2, "num_train_epochs": 1}
    # The roomy run averages inside backward, as DistributedDataParallel does.
    limited = (("short", "shrink", {"rows": 1, "after": 3, "rank": "1"}), ("roomy", "stop", {"rows": 99}))
    for name, what, limits in limited:
        made = values(tiny_model, rows, tmp_path / name, {**settings, "on_out_of_memory": what})
        path = written(tmp_path, name, made)
        done = run_short(limits, "train", path, ranks=2)
        assert done.returncode == 0, done.stdout + done.stderr
    decisions = json.loads((tmp_path / "short" / "run.json").read_text())["decisions"]
    (shrunk,) = (one for one in decisions if one["key"] == "passes_per_batch")
    assert shrunk["value"] == {"2": 2}
    assert "another rank" in shrunk["why"]  # the first one writes, the second one was short
    assert farthest(weights(tmp_path / "short"), weights(tmp_path / "roomy")) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory")
def test_real_memory_that_ends(tiny_model: Path, rows: Path, tmp_path: Path, make_tiny: Any) -> None:
    model = make_tiny(tmp_path / "wide", vocab_size=60_000)
    settings = {"per_device_train_batch_size": 8, "max_steps": 2, **SGD}
    path = written(
        tmp_path, "stopped", values(model, rows, tmp_path / "stopped", {**settings, "on_out_of_memory": "stop"})
    )
    done = run_short({"megabytes": 500}, "train", path)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "error: this machine has no memory left, in forward and backward at step 1" in done.stderr
    assert "can't allocate memory" in done.stderr
    assert "Traceback" not in done.stderr
    path = written(tmp_path, "shrunk", values(model, rows, tmp_path / "shrunk", settings))
    done = run_short({"megabytes": 500}, "train", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: step 1 had no memory for rows of" in done.stdout
    whole = ftune.train(values(model, rows, tmp_path / "whole", settings))
    assert farthest(weights(tmp_path / "shrunk"), weights(whole.directory)) < 1e-6
