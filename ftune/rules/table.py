"""What ftune refuses, warns about, or notes: every row, in the order it is printed.

Rows quantify over facts that plugins declare, not over names, so a new method needs no new row.
"""

from __future__ import annotations

from ftune.machine import Gpu, Machine
from ftune.plugin import Gradients
from ftune.rules.rule import Facts, Rule

_PACKAGES = {
    name: "1" for name in ("torch", "transformers", "datasets", "peft", "bitsandbytes", "accelerate", "flash_attn")
}
_CPU = Machine(packages=_PACKAGES)
_TURING = Machine(gpus=(Gpu("Tesla T4", 16 * 2**30, (7, 5)),), packages=_PACKAGES)


def _evaluates(facts: Facts) -> bool:
    return facts.recipe.data.eval is not None and facts.recipe.training.eval_strategy != "no"


def _pure_half(facts: Facts, dtype: str) -> bool:
    return facts.recipe.model.dtype == dtype and not facts.tuning.frozen_base


def _capability(facts: Facts) -> tuple[int, int]:
    assert facts.machine is not None
    return min((gpu.capability for gpu in facts.machine.gpus), default=(0, 0))


def _missing_packages(facts: Facts) -> bool:
    return bool(facts.words()["missing"])


def _needs_flash(facts: Facts) -> bool:
    return facts.recipe.model.attn_implementation.startswith("flash")


RULES: tuple[Rule, ...] = (
    Rule(
        id="one-precision",
        at="training.fp16",
        when=lambda f: f.recipe.training.fp16 is True and f.recipe.training.bf16 is True,
        what="bf16 and fp16 cannot both be on",
        because="a matrix product is computed in one type",
        instead="keep bf16 on Ampere and newer GPUs, fp16 on older ones, or write auto for both",
        also=(("training.bf16", "asks for bfloat16"),),
        label="asks for float16",
        bad={"training": {"bf16": True, "fp16": True}},
        good={"training": {"bf16": True, "fp16": False}},
    ),
    Rule(
        id="fp16-weights-need-bf16-or-scaler",
        at="model.dtype",
        when=lambda f: _pure_half(f, "float16"),
        what="full fine-tuning cannot hold its weights in float16",
        because="without a float32 copy there is nothing for a loss scaler to protect: the loss is NaN within steps",
        instead="set model.dtype: float32 with training.fp16: true, or model.dtype: bfloat16",
        bad={"model": {"dtype": "float16"}, "tuning": {"method": "full"}},
        good={"model": {"dtype": "bfloat16"}, "tuning": {"method": "full"}},
    ),
    Rule(
        id="fp16-trains-float32-weights",
        at="training.fp16",
        when=lambda f: f.recipe.training.fp16 is True and _pure_half(f, "bfloat16"),
        what="fp16 autocast does not go with bfloat16 weights",
        because="the loss scaler unscales float32 gradients only",
        instead="set model.dtype: float32, or fp16: false",
        bad={"model": {"dtype": "bfloat16"}, "training": {"fp16": True}},
        good={"model": {"dtype": "float32"}, "training": {"fp16": True}},
    ),
    Rule(
        id="pure-bf16-loses-small-updates",
        at="model.dtype",
        when=lambda f: _pure_half(f, "bfloat16") and f.optimizer.gradients is Gradients.KEPT,
        what="pure bfloat16 weights lose small updates",
        because="{optim} rounds each update to 8 bits of precision: at a learning rate of 1e-5 the loss may not move at all",
        instead="set model.dtype: float32 with training.bf16: true, or raise the learning rate",
        severity="warning",
        bad={"model": {"dtype": "bfloat16"}, "tuning": {"method": "full"}},
        good={"model": {"dtype": "bfloat16"}, "tuning": {"method": "lora"}},
    ),
    Rule(
        id="objective-reads-format",
        at="data.format",
        when=lambda f: f.recipe.data.format != "auto" and f.recipe.data.format not in f.objective.formats,
        what="{objective} cannot learn from `{format}` rows",
        because="it reads {formats}",
        instead="set data.format: auto, or choose the objective for these rows",
        bad={"objective": {"method": "pretrain"}, "data": {"format": "alpaca"}},
        good={"objective": {"method": "pretrain"}, "data": {"format": "text"}},
    ),
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
        when=lambda f: f.recipe.training.eval_steps is not None
        and (f.recipe.training.eval_strategy in ("no", "epoch") or f.recipe.data.eval is None),
        what="eval_steps would be ignored",
        because="nothing is evaluated by steps in this recipe",
        instead="set data.eval and eval_strategy: steps, or remove eval_steps",
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
        id="streaming-needs-max-steps",
        at="data.streaming",
        when=lambda f: f.recipe.data.streaming and f.recipe.training.max_steps <= 0,
        what="a streamed data set has no length",
        because="the learning rate schedule has to know where the run ends",
        instead="set training.max_steps",
        bad={"data": {"streaming": True}},
        good={"data": {"streaming": True}, "training": {"max_steps": 100}},
    ),
    Rule(
        id="streaming-cannot-pack",
        at="data.packing",
        when=lambda f: f.recipe.data.streaming and f.recipe.data.packing,
        what="streamed rows cannot be packed",
        because="best-fit packing sorts all rows by length first",
        instead="set streaming: false, or packing: false",
        also=(("data.streaming", "reads rows one by one"),),
        bad={"data": {"streaming": True, "packing": True}, "training": {"max_steps": 100}},
        good={"data": {"streaming": True}, "training": {"max_steps": 100}},
    ),
    Rule(
        id="streaming-cannot-split",
        at="data.eval",
        when=lambda f: f.recipe.data.streaming and isinstance(f.recipe.data.eval, float),
        what="a fraction of a streamed data set cannot be held out",
        because="its number of rows is not known",
        instead="name a file of evaluation rows",
        bad={"data": {"streaming": True, "eval": 0.05}, "training": {"max_steps": 100}},
        good={"data": {"streaming": True, "eval": "eval.jsonl"}, "training": {"max_steps": 100}},
    ),
    Rule(
        id="prefetch-needs-workers",
        at="training.dataloader_prefetch_factor",
        when=lambda f: f.recipe.training.dataloader_prefetch_factor is not None
        and f.recipe.training.dataloader_num_workers == 0,
        what="without workers nothing is prepared ahead",
        because="dataloader_num_workers is 0",
        instead="set dataloader_num_workers: 2, or remove dataloader_prefetch_factor",
        bad={"training": {"dataloader_prefetch_factor": 4}},
        good={"training": {"dataloader_prefetch_factor": 4, "dataloader_num_workers": 2}},
    ),
    Rule(
        id="dora-breaks-compiled-graph",
        at="tuning.use_dora",
        when=lambda f: getattr(f.recipe.tuning.options, "use_dora", False) and f.recipe.training.torch_compile,
        what="DoRA is not compiled",
        because="PEFT recomputes weight norms in Python at every step, which breaks the graph",
        instead="set torch_compile: false, or use_dora: false",
        severity="warning",
        bad={"tuning": {"method": "lora", "use_dora": True}, "training": {"torch_compile": True}},
        good={"tuning": {"method": "lora", "use_dora": True}},
    ),
    Rule(
        id="packing-needs-position-aware-attention",
        at="data.packing",
        when=lambda f: f.recipe.data.packing and f.recipe.training.torch_compile,
        what="packed rows cannot be told apart in a compiled model",
        because="transformers finds their borders from position ids, which it does not do while compiling",
        instead="set torch_compile: false, or packing: false",
        also=(("training.torch_compile", "compiles the model"),),
        bad={"data": {"packing": True}, "training": {"torch_compile": True}},
        good={"data": {"packing": True}},
    ),
    Rule(
        id="sharding-not-available",
        at="distributed.zero_stage",
        when=lambda f: f.recipe.distributed.zero_stage > 0 or f.recipe.distributed.engine in ("deepspeed", "fsdp"),
        what="this version of ftune does not split a model over devices",
        because="it trains with whole replicas (DDP)",
        instead="set zero_stage: 0 and engine: auto; to save memory on each device use tuning.method: lora, "
        "gradient_checkpointing: true or optim: adamw_8bit",
        bad={"distributed": {"zero_stage": 2}},
        good={"distributed": {"zero_stage": 0}},
    ),
    Rule(
        id="offload-needs-sharding",
        at="distributed.offload_optimizer",
        when=lambda f: (f.recipe.distributed.offload_optimizer, f.recipe.distributed.offload_param) != ("none", "none"),
        what="nothing can be moved to the host in this version of ftune",
        because="offload is a part of ZeRO, which it does not run",
        instead="set offload_optimizer: none and offload_param: none",
        bad={"distributed": {"offload_optimizer": "cpu"}},
        good={"distributed": {"offload_optimizer": "none"}},
    ),
    Rule(
        id="fp16-needs-gpu",
        at="training.fp16",
        when=lambda f: f.recipe.training.fp16 is True and f.device_type == "cpu",
        what="fp16 cannot run on a CPU",
        because="there is no loss scaler for CPUs, and Hugging Face would train in float32 without a word",
        instead="set fp16: false; bf16: true is the fast type on CPUs",
        needs="machine",
        bad_machine=_CPU,
        bad={"training": {"fp16": True}},
        good={"training": {"fp16": False, "bf16": True}},
    ),
    Rule(
        id="half-weights-on-cpu",
        at="model.dtype",
        when=lambda f: f.recipe.model.dtype == "float16" and f.device_type == "cpu",
        what="float16 weights cannot be trained on a CPU",
        because="CPUs compute float16 slower than float32 and without a loss scaler",
        instead="set model.dtype: bfloat16 or auto",
        needs="machine",
        bad_machine=_CPU,
        bad={"model": {"dtype": "float16"}, "tuning": {"method": "lora"}},
        good={"model": {"dtype": "bfloat16"}, "tuning": {"method": "lora"}},
    ),
    Rule(
        id="bf16-needs-ampere",
        at="training.bf16",
        when=lambda f: f.recipe.training.bf16 is True and f.device_type == "cuda" and _capability(f) < (8, 0),
        what="this GPU does not compute bfloat16",
        because="bfloat16 came with Ampere (compute capability 8.0)",
        instead="set bf16: false and fp16: true",
        needs="machine",
        bad_machine=_TURING,
        bad={"training": {"bf16": True}},
        good={"training": {"fp16": True}},
    ),
    Rule(
        id="tf32-needs-ampere",
        at="training.tf32",
        when=lambda f: f.recipe.training.tf32 is True and (f.device_type == "cpu" or _capability(f) < (8, 0)),
        what="this machine has no TF32",
        because="TF32 is a mode of Ampere and newer GPUs",
        instead="set tf32: auto",
        needs="machine",
        bad_machine=_CPU,
        bad={"training": {"tf32": True}},
        good={"training": {"tf32": False}},
    ),
    Rule(
        id="flash-attention-needs-gpu",
        at="model.attn_implementation",
        when=lambda f: _needs_flash(f) and f.device_type == "cpu",
        what="{attention} cannot run on a CPU",
        because="its kernels are written for GPUs",
        instead="set attn_implementation: auto",
        needs="machine",
        bad_machine=_CPU,
        bad={"model": {"attn_implementation": "flash_attention_2"}},
        good={"model": {"attn_implementation": "sdpa"}},
    ),
    Rule(
        id="flash-attention-needs-package",
        at="model.attn_implementation",
        when=lambda f: f.device_type == "cuda"
        and _needs_flash(f)
        and f.machine is not None
        and not f.machine.has({"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[
            f.recipe.model.attn_implementation
        ]),
        what="{attention} is not installed",
        because="transformers takes its kernels from the flash-attn package",
        instead="pip install flash-attn --no-build-isolation, or set attn_implementation: auto",
        needs="machine",
        bad_machine=_TURING,
        bad={"model": {"attn_implementation": "flash_attention_3"}},
        good={"model": {"attn_implementation": "sdpa"}},
    ),
    Rule(
        id="package-missing",
        at="training.optim",
        when=_missing_packages,
        what="{missing} is not installed",
        because="{optim} with {tuning} cannot run without it",
        instead="pip install {packages}",
        needs="machine",
        bad_machine=Machine(packages={"torch": "1"}),
        bad={"training": {"optim": "adamw_8bit"}},
        good={"training": {"optim": "adamw_torch"}},
    ),
    Rule(
        id="optimizer-on-this-device",
        at="training.optim",
        when=lambda f: f.device_type in f.optimizer.device_notes,
        what="{optim} is not itself on this machine",
        because="{device_note}",
        instead="choose another optim, or go on",
        severity="note",
        needs="machine",
        bad_machine=_CPU,
        bad={"training": {"optim": "paged_adamw_8bit"}},
        good={"training": {"optim": "adamw_8bit"}},
    ),
)
