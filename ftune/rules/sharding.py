"""Rows on what is split over devices, and by what."""

from __future__ import annotations

from ftune.plugin import Gradients, Sharding
from ftune.rules.rule import Facts, Rule


def _shares(facts: Facts) -> bool:
    """Whether devices share anything: the optimizer's state, at the least."""
    return facts.recipe.distributed.zero_stage > 0


def _offloads(facts: Facts) -> bool:
    return facts.recipe.distributed.offload_optimizer == "cpu"


def _splits(facts: Facts) -> bool:
    return facts.recipe.distributed.splits_weights


def _interleaves(facts: Facts) -> bool:
    return getattr(facts.recipe.optimizer.options, "accumulate", None) == "forward"


def _contradicts(facts: Facts) -> bool:
    """Whether the engine that is named carries another stage than the one that is asked for."""
    return facts.recipe.distributed.engine == ("ddp" if _splits(facts) else "fsdp")


def _moves_whole_replicas(facts: Facts) -> bool:
    """Whether only the state is to be shared, and the optimizer moves weights at other times than at a step's end."""
    return facts.recipe.distributed.zero_stage == 1 and (
        facts.optimizer.gradients is not Gradients.KEPT or facts.optimizer.averages
    )


_SPLITS = (("distributed.zero_stage", "splits weights"),)

RULES: tuple[Rule, ...] = (
    Rule(
        id="deepspeed-not-available",
        at="distributed.engine",
        when=lambda f: f.recipe.distributed.engine == "deepspeed",
        what="this version of ftune does not run DeepSpeed",
        because="its own stage 1, and PyTorch's FSDP2 for stages 2 and 3, need no other package",
        instead="leave engine: auto",
        bad={"distributed": {"engine": "deepspeed", "zero_stage": 2}},
        good={"distributed": {"zero_stage": 2}},
    ),
    Rule(
        id="engine-stage",
        at="distributed.engine",
        when=_contradicts,
        what="the engine does not carry this stage",
        because="ddp holds whole replicas, which are stages 0 and 1; fsdp splits weights, at stages 2 and 3",
        instead="leave engine: auto, and let zero_stage say what is split",
        also=(("distributed.zero_stage", "says what is split"),),
        bad={"distributed": {"engine": "ddp", "zero_stage": 3}},
        good={"distributed": {"engine": "fsdp", "zero_stage": 3}},
    ),
    Rule(
        id="offload-not-available",
        at="distributed.offload_param",
        when=lambda f: f.recipe.distributed.offload_param != "none" or f.recipe.distributed.offload_optimizer == "nvme",
        what="this version of ftune keeps weights on the devices, and nothing on a disk",
        because="what it moves is the optimizer's state, to the host: offload_optimizer: cpu",
        instead="set offload_param: none and offload_optimizer: cpu; zero_stage: 3 splits weights over devices",
        also=(("distributed.offload_optimizer", "says where state waits"),),
        bad={"distributed": {"offload_param": "cpu"}},
        good={"distributed": {"offload_optimizer": "cpu"}},
    ),
    Rule(
        id="offload-optimizer",
        at="distributed.offload_optimizer",
        when=lambda f: (
            _offloads(f)
            and (f.optimizer.gradients is not Gradients.KEPT or f.optimizer.averages or f.optimizer.pages_state)
        ),
        what="offload_optimizer: cpu does not work with optim: {optim}",
        because="gradients go to the host at a step's end, and {optim} keeps none, moves its state itself, or changes "
        "weights at other times",
        instead="set offload_optimizer: none, or optim: adamw_torch",
        also=(("training.optim", "moves weights"),),
        bad={"training": {"optim": "lomo"}, "distributed": {"offload_optimizer": "cpu"}},
        good={"training": {"optim": "adamw_torch"}, "distributed": {"offload_optimizer": "cpu"}},
    ),
    Rule(
        id="offload-tuning",
        at="distributed.offload_optimizer",
        when=lambda f: _offloads(f) and f.tuning.rotates,
        what="offload_optimizer: cpu does not work with tuning.method: {tuning}",
        because="the state of weights that wait for their turn is on the host already",
        instead="set offload_optimizer: none",
        also=(("tuning.method", "moves weights in turn"),),
        bad={"tuning": {"method": "hift"}, "distributed": {"offload_optimizer": "cpu"}},
        good={"tuning": {"method": "hift"}, "distributed": {"offload_optimizer": "none"}},
    ),
    Rule(
        id="sharding-optimizer",
        at="training.optim",
        when=lambda f: _shares(f) and f.optimizer.sharding is Sharding.WHOLE,
        what="{optim} cannot move weights of which a device has some rows",
        because="its step needs the whole of each weight",
        instead="set optim: adamw_torch or adamw_8bit, or at stage 3 adalomo; or zero_stage: 0",
        also=(("distributed.zero_stage", "gives each device some rows"),),
        bad={"training": {"optim": "muon"}, "distributed": {"zero_stage": 3}},
        good={"training": {"optim": "adalomo"}, "distributed": {"zero_stage": 3}},
    ),
    Rule(
        id="sharding-state-alone",
        at="distributed.zero_stage",
        when=_moves_whole_replicas,
        what="stage 1 does not work with optim: {optim}",
        because="devices tell each other the rows that each has moved at the end of a step, and it moves weights "
        "at other times",
        instead="set zero_stage: 3",
        also=(("training.optim", "moves weights inside backward, or for evaluation"),),
        bad={"training": {"optim": "lomo"}, "distributed": {"zero_stage": 1}},
        good={"training": {"optim": "lomo"}, "distributed": {"zero_stage": 3}},
    ),
    Rule(
        id="sharding-tuning",
        at="tuning.method",
        when=lambda f: _splits(f) and not f.tuning.splits,
        what="tuning.method: {tuning} does not work with weights that are split over devices",
        because="{split_note}",
        instead="set tuning.method: lora or full; or zero_stage: 0",
        also=_SPLITS,
        bad={"tuning": {"method": "qlora"}, "distributed": {"zero_stage": 3}},
        good={"tuning": {"method": "lora"}, "distributed": {"zero_stage": 3}},
    ),
    Rule(
        id="sharding-turns",
        at="tuning.method",
        when=lambda f: f.recipe.distributed.zero_stage == 1 and f.tuning.rotates,
        what="tuning.method: {tuning} does not work with state that is split over devices",
        because="only the weights whose turn it is have state",
        instead="set zero_stage: 0",
        also=(("distributed.zero_stage", "splits state"),),
        bad={"tuning": {"method": "hift"}, "distributed": {"zero_stage": 1}},
        good={"tuning": {"method": "hift"}, "distributed": {"zero_stage": 0}},
    ),
    Rule(
        id="sharding-fp16",
        at="training.fp16",
        when=lambda f: (_shares(f) or _offloads(f)) and f.recipe.training.fp16 is True,
        what="float16 does not work where an optimizer moves copies, or some rows, of weights",
        because="whether a scaled loss overflowed is looked for in gradients, and it has those only after clipping",
        instead="set bf16: true and fp16: false",
        also=(("distributed.zero_stage", "gives each device some rows"),),
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
        also=_SPLITS,
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
        also=_SPLITS,
        bad={"training": {"on_out_of_memory": "shrink"}, "distributed": {"zero_stage": 3}},
        good={"training": {"on_out_of_memory": "stop"}, "distributed": {"zero_stage": 3}},
    ),
    Rule(
        id="sharding-interleaves",
        at="training.optim_args",
        when=lambda f: _splits(f) and _interleaves(f),
        what="accumulate: forward does not work with weights that are split over devices",
        because="the graphs of several micro-batches would each want a layer's weights at another time",
        instead="set optim_args: {{accumulate: buffer}}",
        also=_SPLITS,
        bad={
            "training": {
                "optim": "lomo",
                "optim_args": {"accumulate": "forward"},
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": True,
            },
            "distributed": {"zero_stage": 3},
        },
        good={
            "training": {"optim": "lomo", "optim_args": {"accumulate": "buffer"}, "gradient_accumulation_steps": 2},
            "distributed": {"zero_stage": 3},
        },
    ),
)
