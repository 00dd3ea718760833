"""Rows on what becomes of gradients: kept, consumed inside backward, or never made."""

from __future__ import annotations

from ftune.plugin import Gradients
from ftune.rules.rule import Facts, Rule


def _is(facts: Facts, kind: Gradients) -> bool:
    return facts.optimizer.gradients is kind


def _option(facts: Facts, key: str) -> object:
    return getattr(facts.recipe.optimizer.options, key, None)


RULES: tuple[Rule, ...] = (
    Rule(
        id="fused-gradients-are-not-accumulated",
        at="training.gradient_accumulation_steps",
        when=lambda f: (
            f.recipe.training.gradient_accumulation_steps > 1
            and not f.optimizer.accumulates(f.recipe.optimizer.options)
        ),
        what="{optim} cannot accumulate gradients",
        because="it updates each weight inside backward() and frees its gradient: nothing is left to add to, and updates "
        "by parts of a batch are not the update by the whole",
        instead="set optim_args: {{accumulate: forward}} with gradient_checkpointing: true, which runs one backward over "
        "all micro-batches; or {{accumulate: buffer}}, for 2 bytes per weight; or a larger per_device_train_batch_size",
        also=(("training.optim", "frees each gradient"),),
        label="nothing is left to accumulate",
        bad={"training": {"optim": "lomo", "gradient_accumulation_steps": 8}},
        good={
            "training": {
                "optim": "lomo",
                "gradient_accumulation_steps": 8,
                "optim_args": {"accumulate": "forward"},
                "gradient_checkpointing": True,
            }
        },
    ),
    Rule(
        id="accumulated-graphs-are-checkpointed",
        at="training.gradient_checkpointing",
        when=lambda f: (
            _option(f, "accumulate") == "forward"
            and f.recipe.training.gradient_accumulation_steps > 1
            and not f.recipe.training.gradient_checkpointing
        ),
        what="the activations of all micro-batches would be alive at once",
        because="accumulate: forward keeps the graph of each until the one backward",
        instead="set gradient_checkpointing: true, which keeps one tensor per layer",
        also=(("training.optim_args", "keeps their graphs"),),
        severity="warning",
        bad={"training": {"optim": "lomo", "gradient_accumulation_steps": 8, "optim_args": {"accumulate": "forward"}}},
        good={"training": {"optim": "lomo", "gradient_accumulation_steps": 8, "optim_args": {"accumulate": "buffer"}}},
    ),
    Rule(
        id="accumulate-unused",
        at="training.optim_args",
        when=lambda f: _option(f, "accumulate") is not None and f.recipe.training.gradient_accumulation_steps == 1,
        what="accumulate would be ignored",
        because="gradient_accumulation_steps is 1: each micro-batch is a step",
        instead="set gradient_accumulation_steps, or remove accumulate",
        severity="warning",
        bad={"training": {"optim": "lomo", "optim_args": {"accumulate": "buffer"}}},
        good={"training": {"optim": "lomo", "optim_args": {"accumulate": "buffer"}, "gradient_accumulation_steps": 2}},
    ),
    Rule(
        id="one-way-to-clip",
        at="training.max_grad_norm",
        when=lambda f: (
            f.recipe.training.max_grad_norm not in ("auto", 0) and f.optimizer.clips_itself(f.recipe.optimizer.options)
        ),
        what="gradients would be clipped twice",
        because="optim_args limits elements or tensors in one backward, and the global norm needs a second",
        instead="set max_grad_norm: 0 or auto, or remove the limit from optim_args",
        also=(("training.optim_args", "limits gradients too"),),
        bad={"training": {"optim": "lomo", "max_grad_norm": 1.0, "optim_args": {"clip_grad_value": 1.0}}},
        good={"training": {"optim": "lomo", "optim_args": {"clip_grad_value": 1.0}}},
    ),
    Rule(
        id="rounding-unused",
        at="training.optim_args",
        when=lambda f: (
            "rounding" in f.recipe.training.optim_args
            and f.recipe.model.dtype != "bfloat16"
            and _option(f, "rounding") is not None
        ),
        what="rounding would be ignored",
        because="only bfloat16 weights are rounded by chance, and model.dtype is not bfloat16",
        instead="set model.dtype: bfloat16, or remove rounding",
        also=(("model.dtype", "needs no rounding"),),
        severity="warning",
        bad={"training": {"optim": "lomo", "optim_args": {"rounding": "nearest"}}},
        good={"training": {"optim": "lomo", "optim_args": {"rounding": "nearest"}}, "model": {"dtype": "bfloat16"}},
    ),
    Rule(
        id="delayed-rate-needs-a-formula",
        at="training.lr_scheduler_type",
        when=lambda f: (
            f.tuning.delays_rate and f.recipe.training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        ),
        what="{tuning} cannot hold the rate of this schedule",
        because="all groups of layers move once at the same rate, and this schedule has no formula by step to hold",
        instead="set lr_scheduler_type: linear or cosine",
        also=(("tuning.method", "holds the rate for a sweep over the layers"),),
        bad={"tuning": {"method": "hift"}, "training": {"lr_scheduler_type": "reduce_lr_on_plateau"}},
        good={"tuning": {"method": "hift"}, "training": {"lr_scheduler_type": "cosine"}},
    ),
    Rule(
        id="copies-need-sixteen-bits",
        at="tuning.mixed",
        when=lambda f: (
            getattr(f.recipe.tuning.options, "mixed", False) is True and f.recipe.model.dtype == "float32"
        ),
        what="float32 weights need no float32 copies",
        because="mixed: true holds the weights in 16 bits and copies those that move",
        instead="set model.dtype: bfloat16, or mixed: false",
        also=(("model.dtype", "has all bits already"),),
        bad={"tuning": {"method": "hift", "mixed": True}, "model": {"dtype": "float32"}},
        good={"tuning": {"method": "hift", "mixed": True}, "model": {"dtype": "bfloat16"}},
    ),
    Rule(
        id="turns-compile-anew",
        at="training.torch_compile",
        when=lambda f: f.tuning.rotates and f.recipe.training.torch_compile,
        what="the model would be compiled anew at each turn",
        because="which weights need a gradient changes with {tuning}; after eight times PyTorch stops compiling",
        instead="set torch_compile: false",
        also=(("tuning.method", "takes turns"),),
        severity="warning",
        bad={"tuning": {"method": "lisa"}, "training": {"torch_compile": True}},
        good={"tuning": {"method": "lisa"}, "training": {"torch_compile": False}},
    ),
    Rule(
        id="turns-need-kept-gradients",
        at="tuning.method",
        when=lambda f: f.tuning.rotates and not _is(f, Gradients.KEPT),
        what="{tuning} does not go with {optim}",
        because="it hands an optimizer's step and state from one group of layers to the next, and {optim} moves weights "
        "in a way of its own",
        instead="set optim: adamw_torch, or another one that keeps its gradients; or tuning.method: full",
        also=(("training.optim", "keeps no gradients"),),
        bad={"tuning": {"method": "hift"}, "training": {"optim": "lomo"}},
        good={"tuning": {"method": "hift"}, "training": {"optim": "adamw_torch"}},
    ),
)
