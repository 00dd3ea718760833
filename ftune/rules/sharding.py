"""Rows on what is split over devices, and by what."""

from __future__ import annotations

from ftune.plugin import Sharding
from ftune.rules.rule import Facts, Rule


def _splits(facts: Facts) -> bool:
    return facts.recipe.distributed.splits_weights


def _interleaves(facts: Facts) -> bool:
    return getattr(facts.recipe.optimizer.options, "accumulate", None) == "forward"


def _contradicts(facts: Facts) -> bool:
    """Whether the engine that is named carries another stage than the one that is asked for."""
    distributed = facts.recipe.distributed
    return (distributed.engine, distributed.zero_stage) in (("ddp", 3), ("fsdp", 0))


RULES: tuple[Rule, ...] = (
    Rule(
        id="stage-not-available",
        at="distributed.zero_stage",
        when=lambda f: f.recipe.distributed.zero_stage in (1, 2) or f.recipe.distributed.engine == "deepspeed",
        what="this version of ftune splits all or nothing over devices",
        because="it has no DeepSpeed: stage 3 is PyTorch's FSDP2, stage 0 whole replicas (DDP)",
        instead="set zero_stage: 3, which splits optimizer state and gradients too, and engine: auto",
        also=(("distributed.engine", "carries it"),),
        bad={"distributed": {"zero_stage": 2}},
        good={"distributed": {"zero_stage": 3}},
    ),
    Rule(
        id="engine-stage",
        at="distributed.engine",
        when=_contradicts,
        what="the engine does not carry this stage",
        because="ddp holds whole replicas, which is stage 0; fsdp splits everything, which is stage 3",
        instead="leave engine: auto, and let zero_stage say what is split",
        also=(("distributed.zero_stage", "says what is split"),),
        bad={"distributed": {"engine": "ddp", "zero_stage": 3}},
        good={"distributed": {"engine": "fsdp", "zero_stage": 3}},
    ),
    Rule(
        id="offload-not-available",
        at="distributed.offload_optimizer",
        when=lambda f: (f.recipe.distributed.offload_optimizer, f.recipe.distributed.offload_param) != ("none", "none"),
        what="nothing can be moved to the host in this version of ftune",
        because="it has no engine that does so",
        instead="set offload_optimizer: none and offload_param: none; tuning.method: hift keeps state on the host",
        also=(("distributed.offload_param", "moves weights"),),
        bad={"distributed": {"offload_optimizer": "cpu"}},
        good={"distributed": {"offload_optimizer": "none"}},
    ),
    Rule(
        id="sharding-optimizer",
        at="training.optim",
        when=lambda f: _splits(f) and f.optimizer.sharding is Sharding.WHOLE,
        what="{optim} cannot move weights that are split over devices",
        because="its step needs the whole of each weight, of which a device has some rows",
        instead="set optim: adamw_torch, adamw_8bit, adalomo or adafactor_fused_backward; or zero_stage: 0",
        also=(("distributed.zero_stage", "splits weights"),),
        bad={"training": {"optim": "muon"}, "distributed": {"zero_stage": 3}},
        good={"training": {"optim": "adalomo"}, "distributed": {"zero_stage": 3}},
    ),
    Rule(
        id="sharding-tuning",
        at="tuning.method",
        when=lambda f: _splits(f) and not f.tuning.splits,
        what="tuning.method: {tuning} does not work with weights that are split over devices",
        because="{split_note}",
        instead="set tuning.method: lora or full; or zero_stage: 0",
        also=(("distributed.zero_stage", "splits weights"),),
        bad={"tuning": {"method": "qlora"}, "distributed": {"zero_stage": 3}},
        good={"tuning": {"method": "lora"}, "distributed": {"zero_stage": 3}},
    ),
    Rule(
        id="sharding-fp16",
        at="training.fp16",
        when=lambda f: _splits(f) and f.recipe.training.fp16 is True,
        what="float16 does not work with weights that are split over devices",
        because="whether a scaled loss overflowed, each device would find of its own rows alone",
        instead="set bf16: true and fp16: false",
        also=(("distributed.zero_stage", "splits weights"),),
        bad={"training": {"fp16": True}, "distributed": {"zero_stage": 3}},
        good={"training": {"bf16": True}, "distributed": {"zero_stage": 3}},
    ),
    Rule(
        id="sharding-compile",
        at="training.torch_compile",
        when=lambda f: _splits(f) and f.recipe.training.torch_compile,
        what="torch_compile is not checked with weights that are split over devices",
        because="a graph across layers would hold what is gathered for one of them",
        instead="set torch_compile: false; or zero_stage: 0",
        also=(("distributed.zero_stage", "splits weights"),),
        bad={"training": {"torch_compile": True}, "distributed": {"zero_stage": 3}},
        good={"training": {"torch_compile": False}, "distributed": {"zero_stage": 3}},
    ),
    Rule(
        id="sharding-shrink",
        at="training.on_out_of_memory",
        when=lambda f: _splits(f) and f.recipe.training.on_out_of_memory == "shrink",
        what="a step cannot be made smaller where weights are split over devices",
        because="a device that runs out of memory leaves the others waiting for its rows",
        instead="set on_out_of_memory: stop, and a smaller per_device_train_batch_size",
        also=(("distributed.zero_stage", "splits weights"),),
        bad={"training": {"on_out_of_memory": "shrink"}, "distributed": {"zero_stage": 3}},
        good={"training": {"on_out_of_memory": "stop"}, "distributed": {"zero_stage": 3}},
    ),
    Rule(
        id="sharding-interleaves",
        at="training.optim_args",
        when=lambda f: _splits(f) and _interleaves(f),
        what="accumulate: forward does not work with weights that are split over devices",
        because="the graphs of several micro-batches would each want a layer's weights at another time",
        instead="set optim_args: {accumulate: buffer}",
        also=(("distributed.zero_stage", "splits weights"),),
        bad={
            "training": {"optim": "lomo", "optim_args": {"accumulate": "forward"}, "gradient_accumulation_steps": 2},
            "distributed": {"zero_stage": 3},
        },
        good={
            "training": {"optim": "lomo", "optim_args": {"accumulate": "buffer"}, "gradient_accumulation_steps": 2},
            "distributed": {"zero_stage": 3},
        },
    ),
)
