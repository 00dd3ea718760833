"""Rows on the course of a run: steps, schedule, optimizer, evaluation, checkpoints."""

from __future__ import annotations

from typing import Any

from ftune.recipe.schedules import Polynomial, steps_of_decay
from ftune.rules.rule import Facts, Rule


def _between_steps(value: float | None) -> bool:
    return value is not None and value > 1 and value != int(value)


def _whole(key: str, **sections: dict[str, Any]) -> Rule:
    """Return the rule that a number of steps above 1 has no fraction: Hugging Face would cut it off in silence."""
    return Rule(
        id=f"{key.replace('_', '-')}-whole",
        at=f"training.{key}",
        when=lambda f: _between_steps(getattr(f.recipe.training, key)),
        what=f"{key} is neither a number of steps nor a share of them",
        because="from 1 on it counts whole steps; below 1 it is a fraction of all steps",
        instead=f"write a whole number, or a fraction such as {key}: 0.1",
        bad={"training": {key: 2.5}, **sections},
        good={"training": {key: 2}, **sections},
    )


def _evaluates(facts: Facts) -> bool:
    return facts.recipe.data.eval is not None and facts.recipe.training.eval_strategy != "no"


def _least_rates(facts: Facts) -> list[float]:
    options = dict(facts.recipe.training.lr_scheduler_kwargs)
    if facts.recipe.training.lr_scheduler_type == "polynomial":
        options.setdefault("lr_end", Polynomial().lr_end)
    return [options[key] for key in ("min_lr", "lr_end") if options.get(key) is not None]


def _falls_too_long(facts: Facts) -> bool:
    training = facts.recipe.training
    options, steps = training.lr_scheduler_kwargs, training.max_steps
    if training.lr_scheduler_type != "warmup_stable_decay" or steps <= 0 or options.get("num_stable_steps") is not None:
        return False
    return steps_of_decay(options, training.warmup_steps, steps) > steps


def _min_lr_choices(facts: Facts) -> int:
    options = facts.recipe.training.lr_scheduler_kwargs
    return sum(options.get(key) is not None for key in ("min_lr", "min_lr_rate"))


RULES: tuple[Rule, ...] = (
    Rule(
        id="evaluation-needs-rows",
        at="training.eval_strategy",
        when=lambda f: f.recipe.training.eval_strategy in ("steps", "epoch") and f.recipe.data.eval is None,
        what="there are no rows to evaluate on",
        because="data.eval is not set",
        instead="set data.eval to a file, or to a fraction such as 0.05; or eval_strategy: no",
        bad={"training": {"eval_strategy": "epoch"}},
        good={"training": {"eval_strategy": "epoch"}, "data": {"eval": 0.05}},
    ),
    Rule(
        id="evaluation-steps-without-interval",
        at="training.eval_strategy",
        when=lambda f: f.recipe.training.eval_strategy == "steps" and f.recipe.training.eval_steps is None,
        what="evaluation by steps needs to know how many",
        because="eval_steps is not set",
        instead="set eval_steps: 100, or a fraction of all steps such as 0.1",
        bad={"training": {"eval_strategy": "steps"}, "data": {"eval": 0.05}},
        good={"training": {"eval_strategy": "steps", "eval_steps": 10}, "data": {"eval": 0.05}},
    ),
    Rule(
        id="evaluation-interval-unused",
        at="training.eval_steps",
        when=lambda f: (
            f.recipe.training.eval_steps is not None
            and (f.recipe.training.eval_strategy in ("no", "epoch") or f.recipe.data.eval is None)
        ),
        what="eval_steps would be ignored",
        because="nothing is evaluated by steps in this recipe",
        instead="set data.eval and eval_strategy: steps, or remove eval_steps",
        severity="warning",
        bad={"training": {"eval_steps": 10, "eval_strategy": "no"}},
        good={"training": {"eval_steps": 10}, "data": {"eval": 0.05}},
    ),
    Rule(
        id="best-model-needs-evaluation",
        at="training.load_best_model_at_end",
        when=lambda f: f.recipe.training.load_best_model_at_end and not _evaluates(f),
        what="there is no best model without evaluation",
        because="the best is the one with the lowest evaluation loss",
        instead="set data.eval, or load_best_model_at_end: false",
        bad={"training": {"load_best_model_at_end": True}},
        good={"training": {"load_best_model_at_end": True}, "data": {"eval": 0.05}},
    ),
    Rule(
        id="best-model-needs-checkpoints",
        at="training.load_best_model_at_end",
        when=lambda f: f.recipe.training.load_best_model_at_end and f.recipe.training.save_strategy == "no",
        what="the best model cannot be loaded when none is saved",
        because="save_strategy is no",
        instead="set save_strategy: steps or epoch",
        also=(("training.save_strategy", "saves none"),),
        bad={"training": {"load_best_model_at_end": True, "save_strategy": "no"}, "data": {"eval": 0.05}},
        good={"training": {"load_best_model_at_end": True, "save_strategy": "epoch"}, "data": {"eval": 0.05}},
    ),
    Rule(
        id="early-stopping-needs-evaluation",
        at="training.early_stopping_patience",
        when=lambda f: f.recipe.training.early_stopping_patience is not None and not _evaluates(f),
        what="early stopping watches the evaluation loss, and there is none",
        because="data.eval is not set, or eval_strategy is no",
        instead="set data.eval, or remove early_stopping_patience",
        bad={"training": {"early_stopping_patience": 2}},
        good={"training": {"early_stopping_patience": 2}, "data": {"eval": 0.05}},
    ),
    Rule(
        id="early-stopping-threshold-unused",
        at="training.early_stopping_threshold",
        when=lambda f: (
            f.recipe.training.early_stopping_threshold > 0 and f.recipe.training.early_stopping_patience is None
        ),
        what="early_stopping_threshold would be ignored",
        because="without early_stopping_patience the run does not stop early",
        instead="set early_stopping_patience: 3, or remove early_stopping_threshold",
        severity="warning",
        bad={"training": {"early_stopping_threshold": 0.01}, "data": {"eval": 0.05}},
        good={"training": {"early_stopping_threshold": 0.01, "early_stopping_patience": 3}, "data": {"eval": 0.05}},
    ),
    Rule(
        id="save-interval-unused",
        at="training.save_steps",
        when=lambda f: "training.save_steps" in f.given and f.recipe.training.save_strategy != "steps",
        what="save_steps would be ignored",
        because="save_strategy is not steps",
        instead="set save_strategy: steps, or remove save_steps",
        also=(("training.save_strategy", "says when to save"),),
        severity="warning",
        bad={"training": {"save_steps": 100, "save_strategy": "epoch"}},
        good={"training": {"save_steps": 100, "save_strategy": "steps"}},
    ),
    _whole("warmup_steps"),
    _whole("save_steps"),
    _whole("eval_steps", data={"eval": 0.05}),
    Rule(
        id="no-steps",
        at="training.max_steps",
        when=lambda f: f.recipe.training.max_steps == 0,
        what="a run of no steps trains nothing",
        because="Hugging Face would read 0 as no limit, and train for num_train_epochs",
        instead="set max_steps to 1 or more, or remove it and set num_train_epochs",
        bad={"training": {"max_steps": 0}},
        good={"training": {"max_steps": 1}},
    ),
    Rule(
        id="steps-replace-epochs",
        at="training.num_train_epochs",
        when=lambda f: f.recipe.training.max_steps > 0 and "training.num_train_epochs" in f.given,
        what="num_train_epochs does not count here",
        because="max_steps is set, and says alone how long the run is",
        instead="remove one of the two",
        also=(("training.max_steps", "replaces it"),),
        severity="note",
        bad={"training": {"max_steps": 100, "num_train_epochs": 2}},
        good={"training": {"num_train_epochs": 2}},
    ),
    Rule(
        id="constant-schedule-has-no-warmup",
        at="training.warmup_steps",
        when=lambda f: f.recipe.training.lr_scheduler_type == "constant" and f.recipe.training.warmup_steps > 0,
        what="warmup_steps would be ignored",
        because="the constant schedule starts at its peak",
        instead="set lr_scheduler_type: constant_with_warmup, or warmup_steps: 0",
        also=(("training.lr_scheduler_type", "has no warmup"),),
        severity="warning",
        bad={"training": {"lr_scheduler_type": "constant", "warmup_steps": 10}},
        good={"training": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10}},
    ),
    Rule(
        id="schedule-needs-least-rate",
        at="training.lr_scheduler_kwargs",
        when=lambda f: f.recipe.training.lr_scheduler_type == "cosine_with_min_lr" and _min_lr_choices(f) != 1,
        what="cosine_with_min_lr needs one least learning rate",
        because="either min_lr or min_lr_rate says where it ends",
        instead="set lr_scheduler_kwargs: {{min_lr_rate: 0.1}}",
        also=(("training.lr_scheduler_type", "ends above zero"),),
        bad={"training": {"lr_scheduler_type": "cosine_with_min_lr"}},
        good={"training": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}},
    ),
    Rule(
        id="schedule-ends-above-its-peak",
        at="training.lr_scheduler_kwargs",
        when=lambda f: any(rate >= f.learning_rate for rate in _least_rates(f)),
        what="the schedule would not fall",
        because="its end is not below the peak, which is {learning_rate}",
        instead="choose an end below learning_rate",
        also=(("training.learning_rate", "the peak"),),
        bad={"training": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}},
        good={"training": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-7}}},
    ),
    Rule(
        id="decay-longer-than-run",
        at="training.lr_scheduler_kwargs",
        when=_falls_too_long,
        what="the schedule is longer than the run",
        because="it rises and falls over {steps_of_schedule} steps and the run has {steps}: Hugging Face would "
        "leave out the beginning of the fall",
        instead="set a smaller num_decay_steps or warmup_steps, or train for more steps",
        also=(("training.max_steps", "the run"), ("training.warmup_steps", "the rise")),
        bad={
            "training": {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 100},
                "max_steps": 50,
            }
        },
        good={
            "training": {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 20},
                "max_steps": 50,
            }
        },
    ),
    Rule(
        id="nesterov-needs-momentum",
        at="training.optim_args",
        when=lambda f: (
            getattr(f.recipe.optimizer.options, "nesterov", False) and f.recipe.optimizer.options.momentum == 0
        ),
        what="nesterov looks ahead along the momentum, and there is none",
        because="momentum is 0",
        instead="set optim_args: {{momentum: 0.9, nesterov: true}}",
        bad={"training": {"optim": "sgd", "optim_args": {"nesterov": True}}},
        good={"training": {"optim": "sgd", "optim_args": {"nesterov": True, "momentum": 0.9}}},
    ),
)
