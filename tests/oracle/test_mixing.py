"""Losses told apart by source, and batches of like length, against runs that see one source alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from training_runs import EVALUATION, losses, metrics, recipe, rows_file, same_bits, weights

import ftune


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return rows_file(folder / "words.jsonl", 24), rows_file(folder / "terms.jsonl", 12, source=EVALUATION)


def _evaluation(directory: str) -> dict[str, Any]:
    return next(line for line in metrics(directory) if "eval_loss" in line)


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_a_source_is_that_of_a_run_on_it_alone(
    packing: bool, tiny_model: Path, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    words, terms = map(str, sources)

    def first(name: str, train: Any, evaluation: Any) -> str:
        data = {"train": train, "eval": evaluation, "packing": packing}
        settings = {"max_steps": 1, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 5}
        return ftune.train(recipe(tiny_model, sources[0], tmp_path / name, data=data, training=settings)).directory

    both = first("both", [words, terms], [words, terms])
    alone = {"words": first("words", words, words), "terms": first("terms", terms, terms)}
    told, trained = _evaluation(both), metrics(both)[1]
    assert set(told["eval_loss_by_source"]) == set(trained["loss_by_source"]) == set(alone)
    for name, directory in alone.items():
        assert told["eval_loss_by_source"][name] == pytest.approx(_evaluation(directory)["eval_loss"], rel=1e-6)
        assert trained["loss_by_source"][name] == pytest.approx(losses(directory)[0], rel=1e-6)
    learned = {name: metrics(directory)[1]["supervised_tokens"] for name, directory in alone.items()}
    mean = sum(trained["loss_by_source"][name] * learned[name] for name in alone) / sum(learned.values())
    assert trained["loss"] == pytest.approx(mean, rel=1e-6)


def test_weights_decide_how_often_a_source_is_seen(
    tiny_model: Path, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    words, terms = map(str, sources)
    data = {"train": [{"path": words, "weight": 1}, {"path": terms, "weight": 2}]}
    result = ftune.train(recipe(tiny_model, sources[0], tmp_path / "run", data=data))
    # 24 rows at one third: 48 of the others, each of them four times; batches of 4.
    assert result.steps == 18
    assert all(set(line["loss_by_source"]) <= {"words", "terms"} for line in metrics(result.directory))


def test_streamed_sources_are_told_apart_too(tiny_model: Path, sources: tuple[Path, Path], tmp_path: Path) -> None:
    words, terms = map(str, sources)
    data = {"train": [{"path": words, "weight": 1}, {"path": terms, "weight": 1}], "streaming": True}
    settings = {"max_steps": 4, "per_device_train_batch_size": 8}
    result = ftune.train(recipe(tiny_model, sources[0], tmp_path / "run", data=data, training=settings))
    trained = [line for line in metrics(result.directory) if "loss" in line]
    assert len(trained) == 4
    for line in trained:
        told = line["loss_by_source"]
        assert set(told) == {"words", "terms"}
        assert min(told.values()) < line["loss"] < max(told.values())


@pytest.mark.parametrize("settings", [{"group_by_length": True}, {"max_tokens_per_batch": 500}], ids=str)
def test_planned_batches_see_every_row_and_are_resumed_to_the_same_bits(
    settings: dict[str, Any], tiny_model: Path, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    from ftune.machine import probe
    from ftune.training import resuming
    from ftune.training.run import train

    chance = ftune.train(recipe(tiny_model, sources[0], tmp_path / "chance"))
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "num_train_epochs": 2, **settings}
    values = recipe(tiny_model, sources[0], tmp_path / "run", training=saves)
    if "max_tokens_per_batch" in settings:
        del values["training"]["per_device_train_batch_size"]
    run = ftune.train(values)
    assert run.supervised_tokens == 2 * chance.supervised_tokens
    copy = shutil.copytree(run.directory, tmp_path / "copy")
    shutil.rmtree(copy / "model")
    (copy / "result.json").unlink()
    kept = run.steps // 2 + 1  # in the second epoch, after its first batch
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > kept:
            shutil.rmtree(path)
    continued = resuming.reopen(copy, (), probe())
    train(continued.spec, plain=True, checkpoint=continued.checkpoint)
    assert losses(copy) == losses(run.directory)
    assert same_bits(weights(copy), weights(run.directory))


def test_rows_of_a_batch_are_of_like_length(tiny_model: Path, sources: tuple[Path, Path], tmp_path: Path) -> None:
    from ftune.data.batches import batches_of
    from ftune.data.prepare import prepare
    from ftune.models.load import load_tokenizer
    from ftune.recipe.schema import Data, Model

    tokenizer = load_tokenizer(Model(model_name_or_path=str(tiny_model)))
    rows = prepare(Data(train=str(sources[0])), tokenizer=tokenizer, seed=1, cache=None).train
    lengths = [len(row["input_ids"]) for row in rows]
    assert rows.lengths.tolist() == lengths
    spans = [
        max(lengths[at] for at in batch) - min(lengths[at] for at in batch)
        for batch in batches_of(rows.lengths, rows=4, most_tokens=None, ranks=1, seed=0)
    ]
    assert sum(spans) / len(spans) < (max(lengths) - min(lengths)) / 4
