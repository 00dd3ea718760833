"""Runs that ended in every way, and damaged files: the page is made of what there is, and says what there is not."""

from __future__ import annotations

import json
from typing import Any

import pytest


def test_an_interrupted_run(make_run: Any, page: Any, result: dict[str, Any], sample_lines: Any) -> None:
    samples = sample_lines("before", "during")
    found = page(make_run(result_json={**result, "status": "interrupted"}, samples_jsonl=samples))
    assert "my-run interrupted" in found.words()
    assert "after, step" not in found.words()
    assert found.ids["figure-steps"] == "40"


def test_a_failed_run(make_run: Any, page: Any) -> None:
    result = {"status": "failed", "error": "RunError", "message": "the loss is not a number\nlower the rate"}
    found = page(make_run(result_json=result))
    assert "my-run failed" in found.words()
    assert found.ids["figure-message"] == result["message"]


def test_a_run_that_goes_on_or_was_killed(make_run: Any, page: Any) -> None:
    found = page(make_run(result_json=None))
    assert "no result yet: it is running, or was killed" in found.words()
    assert found.points("loss-loss") == 8


def test_full_tuning_without_evaluation_and_samples(
    make_run: Any, page: Any, spec: dict[str, Any], result: dict[str, Any], metric_lines: Any
) -> None:
    recipe = {**spec["recipe"], "tuning": {"method": "full"}}
    found = page(
        make_run(
            run_json={**spec, "recipe": recipe, "data_fingerprint": {}, "decisions": []},
            result_json={**result, "eval_loss": None},
            metrics_jsonl=metric_lines(8, evaluated=False),
            samples_jsonl=None,
        )
    )
    words = found.words()
    assert "tuning full" in words
    assert "figure-eval_loss" not in found.ids
    assert "loss-eval_loss" not in found.paths
    assert "The model was asked nothing." in words
    assert "only local files have one" in words


@pytest.mark.parametrize("count", [1, 2, 40, 41, 3000])
def test_curves_have_a_point_for_each_line(count: int, make_run: Any, page: Any, metric_lines: Any) -> None:
    found = page(make_run(metrics_jsonl=metric_lines(count)))
    curves = ("loss-loss", "learning-rate-learning_rate", "gradient-norm-grad_norm", "speed-tokens_per_second")
    for name in (*curves, "memory-peak_memory_bytes"):
        assert found.points(name) == count, name
    assert found.points("loss-eval_loss") == 2
    assert len(found.source) < 1_500_000


def test_what_cannot_be_seen_is_left_out_of_very_long_curves(make_run: Any, page: Any, metric_lines: Any) -> None:
    found = page(make_run(metrics_jsonl=metric_lines(30_000)))
    assert found.points("loss-loss") < 4000
    assert "at step 149,996" in found.words()


def test_no_step_was_logged(make_run: Any, page: Any) -> None:
    found = page(make_run(metrics_jsonl=None, samples_jsonl=""))
    assert "No step was logged." in found.words()
    assert "svg" not in found.tags


@pytest.mark.parametrize("torn", ['{"step": 9, "loss": 1.', "[1]", "7", "null", '{"step": "9"}x', "\0"])
def test_a_damaged_line_is_left_out_and_said(torn: str, make_run: Any, page: Any, metric_lines: Any) -> None:
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(torn)
    found = page(run)
    assert found.points("loss-loss") == 8
    assert "metrics.jsonl: 1 line is damaged, and left out" in found.words()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '"many"', "true", "1" + 400 * "0", "[1]"])
def test_values_that_are_no_numbers_are_gaps(value: str, make_run: Any, page: Any, metric_lines: Any) -> None:
    lines = [json.dumps(line) for line in metric_lines(9, evaluated=False)]
    keys = ("loss", "grad_norm", "peak_memory_bytes", "learning_rate", "tokens_per_second")
    odd = "{" + ", ".join(['"step": 22', *(f'"{key}": {value}' for key in keys)]) + "}"
    odd_step = '{"step": ' + value + ', "loss": 1.0}'
    found = page(make_run(metrics_jsonl="\n".join([*lines[:4], odd, *lines[4:], odd_step])))
    assert found.points("loss-loss") == 9
    assert "svg" not in page(make_run(metrics_jsonl=odd)).tags


@pytest.mark.parametrize(
    "damaged", ['{"recipe": {"model"', "[]", "7", '{"recipe": [], "decisions": {}, "versions": 1}']
)
def test_a_damaged_run_json_leaves_the_rest(damaged: str, make_run: Any, page: Any) -> None:
    found = page(make_run(run_json=damaged))
    words = found.words()
    assert ("run.json is damaged" in words) == (damaged not in ("[]",) and "decisions" not in damaged)
    assert "a run: finished a run finished" in words
    assert found.points("loss-loss") == 8
    assert found.ids["recipe"].strip() == "# a recipe\nmodel: {}"


@pytest.mark.parametrize("damaged", ['{"status": "fini', "[1]", "null"])
def test_a_damaged_result_is_said(damaged: str, make_run: Any, page: Any) -> None:
    words = page(make_run(result_json=damaged)).words()
    assert "result.json is damaged" in words
    assert "no result yet" in words


def test_figures_of_another_kind_and_new_ones_are_shown_as_they_are(make_run: Any, page: Any) -> None:
    result = {"status": "finished", "steps": "many", "wall_seconds": [1], "tokens": float("nan"), "new_key": 1.5}
    found = page(make_run(result_json=result))
    shown = {name.removeprefix("figure-"): text for name, text in found.ids.items() if name.startswith("figure-")}
    assert shown == {"steps": "many", "wall_seconds": "[1]", "tokens": "nan", "new_key": "1.5"}


def test_answers_of_any_letters(make_run: Any, page: Any) -> None:
    """Half a surrogate pair, which UTF-8 cannot hold; a line separator, which ends no line of JSON; no answer."""
    rows = [json.dumps({"step": 0, "when": "before", "prompt": "p", "answer": "a\ud800b"})]
    rows += [
        json.dumps({"step": 9, "when": "after", "prompt": "p", "answer": "one\u2028two"}, ensure_ascii=False),
        "{}",
    ]
    found = page(make_run(samples_jsonl="\n".join(rows)))
    assert "a?b" in found.text
    assert "one\u2028two" in found.text
    assert "damaged" not in found.text


def test_a_recipe_that_is_gone_is_taken_from_run_json(make_run: Any, page: Any) -> None:
    assert page(make_run(recipe_yaml=None)).ids["recipe"].strip() == "model: {}"
