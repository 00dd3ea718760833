"""Rows on what becomes of gradients: kept, consumed inside backward, or never made."""

from __future__ import annotations

from ftune.plugin import Gradients
from ftune.rules.rule import Facts, Rule


def _is(facts: Facts, kind: Gradients) -> bool:
    return facts.optimizer.gradients is kind


def _option(facts: Facts, key: str) -> object:
    return getattr(facts.recipe.optimizer.options, key, None)


def _adapter_is_narrower(facts: Facts) -> bool:
    """Whether an optimizer that projects matrices gets only those of an adapter no wider than its rank."""
    rank, width = _option(facts, "rank"), getattr(facts.recipe.tuning.options, "r", None)
    return isinstance(rank, int) and isinstance(width, int) and facts.tuning.has_adapter and width <= rank


RULES: tuple[Rule, ...] = (
    Rule(
        id="fused-gradients-are-not-accumulated",
        at="training.gradient_accumulation_steps",
        when=lambda f: (
            f.recipe.training.gradient_accumulation_steps > 1
            and not f.optimizer.accumulates(f.recipe.optimizer.options)
        ),
        what="{optim} cannot accumulate gradients",
        because="it updates each weight inside backward() and frees its gradient: nothing is left to add to, and "
        "updates by parts of a batch are not the update by the whole",
        instead="set optim_args: {{accumulate: forward}} with gradient_checkpointing: true, which runs one backward "
        "over all micro-batches; or {{accumulate: buffer}}, for 2 bytes per weight; or a larger "
        "per_device_train_batch_size",
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
        id="only-kept-gradients-shrink",
        at="training.on_out_of_memory",
        when=lambda f: f.recipe.training.on_out_of_memory == "shrink" and not _is(f, Gradients.KEPT),
        what="a step of {optim} cannot be made again in smaller passes",
        because="when memory runs out in the middle of a step, weights have moved already, or stand aside: it can be "
        "neither finished nor undone",
        instead="set on_out_of_memory: stop; or optim: adamw_torch, or another one that keeps its gradients",
        also=(("training.optim", "keeps no gradients"),),
        bad={"training": {"optim": "lomo", "on_out_of_memory": "shrink"}},
        good={"training": {"optim": "adamw_torch", "on_out_of_memory": "shrink"}},
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
        id="copies-need-sixteen-bits",
        at="tuning.mixed",
        when=lambda f: getattr(f.recipe.tuning.options, "mixed", False) is True and f.recipe.model.dtype == "float32",
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
        because="it steps the optimizer of some layers at a time over gradients that were kept, and {optim} keeps none",
        instead="set optim: adamw_torch, or another one that keeps its gradients; or tuning.method: full",
        also=(("training.optim", "keeps no gradients"),),
        bad={"tuning": {"method": "hift"}, "training": {"optim": "lomo"}},
        good={"tuning": {"method": "hift"}, "training": {"optim": "adamw_torch"}},
    ),
    Rule(
        id="adapter-rate-unused",
        at="training.optim_args",
        when=lambda f: "adapter_learning_rate" in f.recipe.training.optim_args and not f.tuning.folds,
        what="adapter_learning_rate would be ignored",
        because="{tuning} trains no adapter beside weights that are trained too: all move at learning_rate",
        instead="set tuning.method: lora_and_full, or remove adapter_learning_rate",
        also=(("tuning.method", "trains one kind of weights"),),
        severity="warning",
        bad={"training": {"optim": "lomo", "optim_args": {"adapter_learning_rate": 5e-4}}},
        good={
            "tuning": {"method": "lora_and_full"},
            "training": {"optim": "lomo", "optim_args": {"adapter_learning_rate": 5e-4}},
        },
    ),
    Rule(
        id="adapter-moves-as-the-weights",
        at="tuning.method",
        when=lambda f: f.tuning.folds and _option(f, "adapter_learning_rate") is None,
        what="{optim} moves the adapter as it moves the weights beside it",
        because="the adapter can say nothing that the weights cannot: what it is there for is AdamW at a rate of its "
        "own, beside weights that have no optimizer state",
        instead="set optim: lomo or adalomo, which do that; or tuning.method: full",
        also=(("training.optim", "has one rule for both"),),
        severity="warning",
        bad={"tuning": {"method": "lora_and_full"}, "training": {"optim": "adamw_torch"}},
        good={"tuning": {"method": "lora_and_full"}, "training": {"optim": "lomo"}},
    ),
    Rule(
        id="modules-move-already",
        at="tuning.modules_to_save",
        when=lambda f: f.tuning.folds and getattr(f.recipe.tuning.options, "modules_to_save", None) is not None,
        what="modules_to_save would train a copy of layers that are trained already",
        because="{tuning} trains every weight, and the adapter beside them",
        instead="remove modules_to_save",
        bad={"tuning": {"method": "lora_and_full", "modules_to_save": ["lm_head"]}, "training": {"optim": "lomo"}},
        good={"tuning": {"method": "lora_and_full"}, "training": {"optim": "lomo"}},
    ),
    Rule(
        id="forward-only-is-not-compiled",
        at="training.torch_compile",
        when=lambda f: _is(f, Gradients.NONE) and f.recipe.training.torch_compile,
        what="{optim} does not run on a compiled model",
        because="it exchanges weights around the forward of each layer, and a compiled graph has them fixed",
        instead="set torch_compile: false",
        also=(("training.optim", "exchanges weights"),),
        bad={"training": {"optim": "mezo", "torch_compile": True}},
        good={"training": {"optim": "mezo"}},
    ),
    Rule(
        id="no-backward-to-checkpoint",
        at="training.gradient_checkpointing",
        when=lambda f: (
            _is(f, Gradients.NONE) and not f.optimizer.calibrates and f.recipe.training.gradient_checkpointing
        ),
        what="gradient_checkpointing does nothing here",
        because="{optim} makes no backward pass that would need activations",
        instead="remove gradient_checkpointing",
        severity="note",
        bad={"training": {"optim": "mezo", "gradient_checkpointing": True}},
        good={"training": {"optim": "mezo"}},
    ),
    Rule(
        id="adapters-are-not-thinned-out",
        at="tuning.method",
        when=lambda f: f.optimizer.calibrates and f.tuning.has_adapter,
        what="{optim} has nothing to choose from in an adapter",
        because="half of its matrices begin at zero, where the gradients of the other half are zero",
        instead="set optim: mezo, or tuning.method: full",
        also=(("training.optim", "chooses weights by their gradients"),),
        bad={"tuning": {"method": "lora"}, "training": {"optim": "sparse_mezo"}},
        good={"training": {"optim": "sparse_mezo"}},
    ),
    Rule(
        id="forward-only-rate",
        at="training.learning_rate",
        when=lambda f: _is(f, Gradients.NONE) and not f.tuning.has_adapter and f.learning_rate > 1e-3,
        what="a rate of {learning_rate} is that of a method with gradients",
        because="the estimate is as long as the gradient times the root of the number of weights",
        instead="set learning_rate: auto, or between 1e-7 and 1e-5",
        severity="warning",
        bad={"training": {"optim": "mezo", "learning_rate": 1e-2}},
        good={"training": {"optim": "mezo", "learning_rate": 1e-6}},
    ),
    Rule(
        id="forward-only-adapter",
        at="tuning.method",
        when=lambda f: (
            _is(f, Gradients.NONE)
            and f.tuning.has_adapter
            and not f.optimizer.calibrates
            and "eps" not in f.recipe.training.optim_args
        ),
        what="adapters want larger steps from {optim}",
        because="the paper's runs with LoRA have eps 1e-2, and a rate of 5e-5 (which auto is) or 1e-4",
        instead="set optim_args: {{eps: 1e-2}}",
        severity="note",
        bad={"tuning": {"method": "lora"}, "training": {"optim": "mezo"}},
        good={"tuning": {"method": "lora"}, "training": {"optim": "mezo", "optim_args": {"eps": 1e-2}}},
    ),
    Rule(
        id="average-needs-a-constant-rate",
        at="training.lr_scheduler_type",
        when=lambda f: (
            f.optimizer.averages and f.recipe.training.lr_scheduler_type not in ("constant", "constant_with_warmup")
        ),
        what="{optim} wants a constant learning rate",
        because="its average does what a falling rate is for: with both, late steps hardly count",
        instead="set lr_scheduler_type: constant_with_warmup",
        also=(("training.optim", "averages its steps"),),
        severity="warning",
        bad={"training": {"optim": "schedule_free_adamw", "lr_scheduler_type": "cosine"}},
        good={"training": {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant_with_warmup"}},
    ),
    Rule(
        id="averages-take-no-turns",
        at="tuning.method",
        when=lambda f: f.tuning.rotates and f.optimizer.averages,
        what="{tuning} does not go with {optim}",
        because="{optim} evaluates and saves an average of all steps of a weight, and {tuning} stops and begins anew",
        instead="set optim: adamw_torch, or tuning.method: full",
        also=(("training.optim", "averages its steps"),),
        bad={
            "tuning": {"method": "lisa"},
            "training": {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
        },
        good={"tuning": {"method": "lisa"}, "training": {"optim": "adamw_torch"}},
    ),
    Rule(
        id="nothing-to-project",
        at="training.optim_args",
        when=_adapter_is_narrower,
        what="{optim} projects nothing here",
        because="matrices that are no wider than its rank get plain AdamW, and so do all of this adapter",
        instead="set optim: adamw_torch, or tuning.method: full",
        also=(("tuning.r", "no wider"),),
        severity="warning",
        bad={"tuning": {"method": "lora", "r": 16}, "training": {"optim": "galore_adamw"}},
        good={"training": {"optim": "galore_adamw"}},
    ),
    Rule(
        id="one-direction-needs-a-scale",
        at="training.optim_args",
        when=lambda f: _option(f, "scale_type") is not None and _option(f, "rank") == 1 and _option(f, "scale") == 1.0,
        what="rank 1 with scale 1 moves far too little",
        because="Adam in one of m dimensions steps sqrt(1 / m) as far as in all of them",
        instead="set optim_args: {{rank: 1, scale: 128, scale_type: tensor}}, which is APOLLO-Mini",
        severity="warning",
        bad={"training": {"optim": "apollo_adamw", "optim_args": {"rank": 1}}},
        good={"training": {"optim": "apollo_adamw", "optim_args": {"rank": 1, "scale": 128, "scale_type": "tensor"}}},
    ),
)
