"""A run that knows what it is going to need: stopped before its weights are loaded, or told what it ran out of."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from short_of_memory import room_for
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_runs import recipe, rows_file

import ftune
from ftune.errors import MachineError, Problem, RunError
from ftune.machine import Machine, probe
from ftune.memory.auto_rows import PASSES, ROWS
from ftune.models.finished import spec_of
from ftune.recipe import load
from ftune.resolve import Decision, examine, resolve, with_training
from ftune.training import directory, resuming, run
from ftune.training.foretold import BatchesOf, ChooseRows, Forecast, Foresee, LargestBatches

MIB = 2**20


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", 30)


@pytest.fixture
def unreadable(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a model whose weights cannot be loaded."""
    shutil.copytree(tiny_model, tmp_path / "unreadable")
    path = tmp_path / "unreadable" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return tmp_path / "unreadable"


def trained(
    values: dict[str, Any], foresee: Foresee | None, *, force: bool = False, choose_rows: ChooseRows | None = None
) -> Any:
    """Train a recipe with another way to foresee it."""
    machine = probe()
    loaded, _ = examine(values, (), machine)
    assert loaded is not None
    spec = resolve(loaded, machine)
    directory.create(spec)
    return run.train(spec, plain=True, foresee=foresee, choose_rows=choose_rows, force=force)


def forecast(refusal: Problem | None) -> Foresee:
    parts = {"weights": 3 * MIB, "activations": 5 * MIB, "gradients": 0}
    return lambda spec, batches_of: Forecast(8 * MIB, parts, ("plan: 8.0 MiB needed",), refusal)


REFUSED = Problem("plan-too-large", "the largest batch does not fit", fix="set less")


def test_what_cannot_fit_stops_before_the_weights_are_loaded(unreadable: Path, rows: Path, tmp_path: Path) -> None:
    values = recipe(unreadable, rows, tmp_path / "run")
    with pytest.raises(MachineError, match="the largest batch does not fit") as refused:
        trained(values, forecast(REFUSED))
    assert refused.value.exit_code == 3
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    with pytest.raises(RunError, match="damaged"):
        trained({**values, "training": {**values["training"], "output_dir": str(tmp_path / "b")}}, forecast(None))


def test_forced_it_goes_on_and_both_figures_are_kept(
    tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe(tiny_model, rows, tmp_path / "run", training={"max_steps": 1})
    result = trained(values, forecast(REFUSED), force=True)
    assert "warning: the largest batch does not fit; training all the same" in capsys.readouterr().out
    assert result.predicted_peak_bytes == 8 * MIB
    assert result.peak_memory_bytes > 100 * MIB
    page = (tmp_path / "run" / "report.html").read_text()
    assert "peak memory, of the process" in page
    assert "peak memory, predicted of tensors alone" in page
    assert "8.0 MiB" in page


@pytest.mark.parametrize("error", [RunError(Problem("trace-failed", "it cannot be traced")), ZeroDivisionError("odd")])
def test_a_plan_that_fails_stops_no_run(
    tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fails(*_: Any) -> Forecast:
        raise error

    result = trained(recipe(tiny_model, rows, tmp_path / "run", training={"max_steps": 1}), fails)
    assert (result.status, result.predicted_peak_bytes) == ("finished", None)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("no plan: "))
    assert str(error) in line


def test_on_a_processor_nothing_is_planned_unasked(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    from ftune.cli.train import foresight
    from ftune.machine import Gpu

    values = recipe(tiny_model, rows, tmp_path / "run")
    spec = resolve(load(values), probe(), fingerprints=False)
    assert foresight(spec, Machine(), None) == {}
    assert foresight(spec, Machine(), True)["foresee"] is not None
    with_gpu = Machine(gpus=(Gpu("NVIDIA L4", 24 * 2**30, (8, 9)),))
    assert foresight(spec, with_gpu, None)["foresee"] is not None
    assert foresight(spec, with_gpu, False) == {}
    # Rows that are left open are chosen in any case.
    left_open = resolve(load(values, ["training.per_device_train_batch_size=auto"]), probe(), fingerprints=False)
    found = foresight(left_open, Machine(), None)
    assert found["foresee"] is None
    assert found["choose_rows"] is not None


class TestLargestBatches:
    """What is planned is held against every batch that a run makes."""

    @pytest.mark.parametrize(
        ("training", "data"),
        [
            ({"per_device_train_batch_size": 4}, {}),
            ({"per_device_train_batch_size": 1}, {}),
            ({"per_device_train_batch_size": 3, "group_by_length": True}, {}),
            ({"max_tokens_per_batch": 500}, {}),
            ({"per_device_train_batch_size": 4}, {"packing": True}),
        ],
    )
    def test_no_batch_of_the_run_is_larger(
        self, tiny_model: Path, rows: Path, tmp_path: Path, training: dict[str, Any], data: dict[str, Any]
    ) -> None:
        seen: list[LargestBatches] = []
        made: list[tuple[int, int, int]] = []

        def sees(spec: Any, batches_of: BatchesOf) -> Forecast:
            seen.append(batches_of(spec))
            return forecast(None)(spec, batches_of)

        with batches_of_a_run(made):
            trained(recipe(tiny_model, rows, tmp_path / "run", training=training, data=data), sees)
        (largest,) = seen
        longest, count = max(largest.train), len(largest.train)
        most_learned = longest if largest.learned is None else largest.learned
        assert len(made) >= 7 or data
        assert max(size * length for size, length, _ in made) == count * longest
        assert (count, longest) in {(size, length) for size, length, _ in made}
        assert max(size * learned for size, _, learned in made) <= count * most_learned
        if training == {"per_device_train_batch_size": 1} and not data:
            assert max(learned for _, _, learned in made) == largest.learned < longest


@contextmanager
def batches_of_a_run(found: list[tuple[int, int, int]]) -> Iterator[None]:
    """Note the rows, the length and the places with a learned token of each batch."""

    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def noted(self: Any, **named: Any) -> Any:
        if torch.is_grad_enabled() and self.training:
            found.append((*named["input_ids"].shape, len(named["logits_to_keep"])))
        return forward(self, **named)

    LlamaForCausalLM.forward = noted
    try:
        yield
    finally:
        LlamaForCausalLM.forward = forward


def test_learned_tokens_of_rows_are_counted(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    from ftune.data.prepare import prepare
    from ftune.models.load import load_tokenizer
    from ftune.recipe import load

    made = load(recipe(tiny_model, rows, tmp_path / "run", data={"train": [{"path": str(rows), "weight": 2.0}] * 2}))
    data = prepare(made.recipe.data, tokenizer=load_tokenizer(made.recipe.model), seed=1, cache=tmp_path).train
    expected = [int((data[at]["labels"] != -100).sum()) for at in range(len(data))]
    assert data.learned().tolist() == expected
    assert len(set(expected)) > 5


class TestOpenRows:
    """`per_device_train_batch_size: auto`, decided when the rows are there."""

    def test_what_is_decided_is_what_the_run_does(
        self, tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made: list[tuple[int, int, int]] = []
        seen: list[Any] = []

        def chooses(spec: Any, batches_of: BatchesOf) -> tuple[Decision, ...]:
            seen.append(batches_of(with_training(spec, per_device_train_batch_size=3)))
            return Decision(ROWS, 2, "two fit"), Decision(PASSES, 4, "4 x 2 are 8")

        training = {"per_device_train_batch_size": "auto", "max_steps": 2, "gradient_accumulation_steps": 1}
        with batches_of_a_run(made):
            trained(recipe(tiny_model, rows, tmp_path / "auto", training=training), None, choose_rows=chooses)
        assert len(seen[0].train) == 3
        assert [size for size, _, _ in made] == [2] * 8
        assert f"{ROWS} = 2: two fit" in capsys.readouterr().out
        spec = spec_of(tmp_path / "auto")
        assert (spec.recipe.training.per_device_train_batch_size, spec.training_arguments[PASSES[9:]]) == (2, 4)
        assert [one.why for one in spec.decisions if one.key == ROWS] == ["two fit"]
        numbers = {**training, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        trained(recipe(tiny_model, rows, tmp_path / "numbers", training=numbers), None)
        same = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("auto", "numbers")]
        assert same[0] == same[1]
        # Going on, it keeps what was decided, though the recipe still says auto.
        for changes in ([], ["training.max_steps=3"]):
            if not changes:
                (tmp_path / "auto" / "result.json").unlink()
            again = resuming.reopen(tmp_path / "auto", changes, probe()).spec
            training_of = again.recipe.training
            assert (training_of.per_device_train_batch_size, training_of.gradient_accumulation_steps) == (2, 4)
            assert again.training_arguments["per_device_train_batch_size"] == 2
            assert [one.why for one in again.decisions if one.key == ROWS] == ["two fit"]
        with pytest.raises(RunError, match="other settings for what it has already learned"):
            resuming.reopen(tmp_path / "auto", [f"{ROWS}=4"], probe())

    def test_without_a_plan_a_number_is_asked_for(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        def fails(*_: Any) -> Any:
            raise ZeroDivisionError("odd")

        values = recipe(tiny_model, rows, tmp_path / "run", training={"per_device_train_batch_size": "auto"})
        with pytest.raises(RunError, match="no plan says how many rows fit at once") as stopped:
            trained(values, None, choose_rows=fails)
        assert stopped.value.problems[0].fix == "set training.per_device_train_batch_size to a number"

    def test_several_processes_are_refused(
        self, tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values = recipe(tiny_model, rows, tmp_path / "run", training={"per_device_train_batch_size": "auto"})
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(RunError, match="decided by the plan of one process"):
            trained(values, None)


class TestWhatRanOut:
    def test_of_a_step_with_a_plan(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        values = recipe(tiny_model, rows, tmp_path / "run")
        with room_for(2, after=2), pytest.raises(RunError) as stopped:
            trained(values, forecast(None))
        (problem,) = stopped.value.problems
        assert problem.rule == "out-of-memory"
        assert problem.what == "this machine has no memory left, in forward and backward at step 3"
        lengths = problem.why.removeprefix("rows of ").partition(" tokens")[0].split(", ")
        assert len(lengths) == 4
        assert all(20 < int(length) < 200 for length in lengths)
        assert "the plan has at the peak activations 5.0 MiB, weights 3.0 MiB;" in problem.why
        assert "CUDA out of memory" in problem.why
        assert problem.fix.startswith("set per_device_train_batch_size: 2 with gradient_accumulation_steps: 2; or ")
        assert "gradient_checkpointing: true" in problem.fix

    def test_of_moving_the_weights(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        def short(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        handle = register_optimizer_step_pre_hook(short)
        try:
            with pytest.raises(RunError) as stopped:
                ftune.train(recipe(tiny_model, rows, tmp_path / "run", training={"on_out_of_memory": "shrink"}))
        finally:
            handle.remove()
        (problem,) = stopped.value.problems
        assert problem.what == "this machine has no memory left, moving the weights at step 1"
        assert problem.fix == "set tuning: {method: lora}"

    def test_of_evaluating(self, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
        def short(module: Any, _: Any) -> None:
            if type(module).__name__ == "LlamaMLP" and not module.training:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"
                )

        values = recipe(tiny_model, rows, tmp_path / "run", data={"eval": 0.2})
        handle = torch.nn.modules.module.register_module_forward_pre_hook(short)
        try:
            with pytest.raises(RunError) as stopped:
                ftune.train(values)
        finally:
            handle.remove()
        (problem,) = stopped.value.problems
        assert problem.what == "this machine has no memory left, evaluating at step 0"
        assert problem.fix == "set training.per_device_eval_batch_size=4"


@pytest.mark.slow
class TestRealPlans:
    """Of steps that are traced, on a machine that has less memory than there is."""

    def test_too_little_is_refused_with_a_change_that_fits(self, unreadable: Path, rows: Path, tmp_path: Path) -> None:
        from ftune.memory.foreseen import Foresight

        values = recipe(unreadable, rows, tmp_path / "run", training={"per_device_train_batch_size": 8})
        small = dataclasses.replace(probe(), memory_bytes=7 * MIB)
        with pytest.raises(MachineError) as refused:
            trained(values, Foresight(small).foresee)
        (problem,) = refused.value.problems
        assert problem.what.startswith("the largest batch, of 8 x 1")
        assert problem.what.endswith("and the processor has 7.0 MiB")
        assert "activations" in problem.why
        change, _, _ = problem.fix.partition(", which ")
        settings = dict(part.split(": ") for part in change.removeprefix("set ").split(" with "))
        # What is advised passes, on the same machine.
        told = {key: json.loads(value) for key, value in settings.items()}
        assert told["per_device_train_batch_size"] * told["gradient_accumulation_steps"] == 8
        advised = recipe(unreadable, rows, tmp_path / "advised", training=told)
        with pytest.raises(RunError, match="damaged"):
            trained(advised, Foresight(small).foresee)

    def test_where_nothing_fits_a_wider_search_is_named(self, unreadable: Path, rows: Path, tmp_path: Path) -> None:
        from ftune.memory.foreseen import Foresight

        values = recipe(unreadable, rows, tmp_path / "run")
        # Room for the weights, and for nothing that moves all of them.
        small = dataclasses.replace(probe(), memory_bytes=400_000)
        with pytest.raises(MachineError) as refused:
            trained(values, Foresight(small).foresee)
        (problem,) = refused.value.problems
        assert "nothing that learns the same was found to fit: `ftune plan RECIPE --fit --allow " in problem.fix

    def test_as_many_rows_as_fit_are_taken(self, unreadable: Path, rows: Path, tmp_path: Path) -> None:
        from ftune.memory.foreseen import Foresight

        training = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 1}
        values = recipe(unreadable, rows, tmp_path / "run", training=training)
        small = dataclasses.replace(probe(), memory_bytes=7 * MIB)
        foresight = Foresight(small)
        with pytest.raises(RunError, match="damaged"):  # not refused: what was decided fits
            trained(values, foresight.foresee, choose_rows=foresight.choose_rows)
        decided = spec_of(tmp_path / "run").recipe.training
        assert decided.rows_at_once in (2, 4)
        assert decided.rows_at_once * decided.gradient_accumulation_steps == 8
        # One size more would not have fit into nine tenths.
        more = {"per_device_train_batch_size": 2 * decided.rows_at_once, "gradient_accumulation_steps": 1}
        less = dataclasses.replace(probe(), memory_bytes=int(0.9 * 7 * MIB))
        with pytest.raises(MachineError, match="does not fit"):
            trained(recipe(unreadable, rows, tmp_path / "more", training=more), Foresight(less).foresee)

    def test_the_command(self, tiny_model: Path, rows: Path, tmp_path: Path, ftune: Any) -> None:
        import yaml

        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(tiny_model, rows, tmp_path / "run", training={"max_steps": 1})))
        done = ftune("train", path, "--plan")
        assert done.returncode == 0, done.stderr
        assert "plan: of tensors; peak_memory_bytes is the resident memory of the process" in done.stdout
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert MIB < result["predicted_peak_bytes"] < 20 * MIB
