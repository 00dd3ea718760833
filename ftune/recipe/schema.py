"""What a recipe may say: six sections, in the spelling Hugging Face users know.

The string under a field is its documentation: `ftune explain`, `ftune schema` and `docs/recipe.md` print it.
`objective` and `tuning` choose a plugin by `method`; the rest of such a section belongs to that plugin's own options,
as `training.optim_args` belongs to the optimizer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ftune import plugin
from ftune.options import (
    Flag,
    FlagOrAuto,
    Fraction,
    Integer,
    NotNegative,
    NumberOrAuto,
    Options,
    Positive,
    Text,
)

Share = Annotated[Fraction, Field(gt=0)]
"""A part of the rows: neither none nor all of them."""

Tracker = Literal[
    "none", "clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]


class Model(Options):
    """What to start from."""

    model_name_or_path: Text
    """A hub name, a directory, or `package:NAME` for weights that an installed Python package ships."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model."""
    gguf_file: Text | None = None
    """A GGUF file inside the model's directory: dequantised once to safetensors, cached, and trained like any model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the weights are held in while training; `bfloat16` with full tuning is pure bf16."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """How attention is computed; `auto` takes the best one present."""
    trust_remote_code: Flag = False
    """Run Python code that the model repository ships. Off unless you trust its authors."""


class Source(Options):
    """One of several sources of rows."""

    path: Text
    """A file, a directory, or a hub name."""
    weight: Positive | None = None
    """Its share of the rows drawn, relative to the other sources'; without any weights every row is seen once."""
    format: Text = "auto"
    """How its rows are written; `auto` looks at the first row's keys."""


def _kind_of_source(value: Any) -> str:
    return "source" if isinstance(value, (dict, Source)) else "name"


SourceOrName = Annotated[
    Annotated[Text, Tag("name")] | Annotated[Source, Tag("source")], Discriminator(_kind_of_source)
]
"""Told apart beforehand, so that a mistake in a mapping is not also one in a name."""


class Data(Options):
    """What it learns from."""

    train: Text | Annotated[list[SourceOrName], Field(min_length=1)]
    """File(s), a directory, or a hub name; several sources as `{path, weight, format}`. Relative paths count from here,
    then from the recipe's folder."""
    eval: Text | Annotated[list[SourceOrName], Field(min_length=1)] | Share | None = None
    """The same, or a fraction of the training rows to hold out, such as 0.05."""
    mixing_temperature: Positive | None = None
    """Draw from each source by rows ** (1 / temperature): 1 is in proportion, more evens out; instead of weights."""
    mixing_stop: Literal["first_exhausted", "all_exhausted"] = "all_exhausted"
    """A weighted mix ends when the first source is used up, or repeats sources until every row was seen."""
    train_split: Text = "train"
    """Which split of a hub data set to train on."""
    eval_split: Text = "validation"
    """Which split of a hub data set to evaluate on."""
    max_train_samples: Integer | None = Field(default=None, ge=1)
    """At most so many training rows, the first ones."""
    max_eval_samples: Integer | None = Field(default=None, ge=1)
    """At most so many evaluation rows, the first ones."""
    format: Text = "auto"
    """How a row is written; `auto` looks at the first row's keys."""
    max_length: Integer = Field(default=2048, ge=2)
    """Longest row in tokens. Longer ones are cut at the end, and counted; plain text goes on in a further row."""
    packing: Flag = False
    """Put several rows into one sequence, without attention between them."""
    num_proc: Annotated[Integer, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that turn rows into tokens; `auto` takes one for each core when there are many rows."""
    audit_ignore: list[Text] = Field(default_factory=list)
    """Findings of the audit that are as they should be, by name: they neither stop the run nor are told."""
    assistant_only_loss: Flag = True
    """Learn only what the assistant says; false learns every token of a conversation."""
    train_on_turns: Literal["all", "last"] = "all"
    """Which answers of a conversation are learned: `all`, or the `last` of those a row does not mark as untrained."""
    completion_only_loss: Flag = True
    """Learn only the completion of a prompt; false learns the prompt too."""
    chat_template: Text | None = None
    """A Jinja file to use instead of the model's own chat template; it is saved with the result."""
    streaming: Flag = False
    """Read rows while training instead of tokenising them first; needs `training.max_steps`."""
    shuffle_buffer_size: Integer = Field(default=10_000, ge=1)
    """How many streamed rows are held to draw the next one from."""

    @property
    def is_weighted(self) -> bool:
        """Whether training sources have weights."""
        return any(source.weight is not None for source in listed(self.train))

    @property
    def is_mixed(self) -> bool:
        """Whether training rows are drawn in shares, and not each once."""
        return self.is_weighted or self.mixing_temperature is not None


_ROWS = 8
"""Of a micro-batch; Hugging Face's default too."""


class Training(Options):
    """How each step is made."""

    output_dir: Text
    """The run directory; it must be new or empty. `ftune resume` goes on with a run that is there."""
    num_train_epochs: Positive = 3.0
    """How often every row is seen."""
    max_steps: Integer = Field(default=-1, ge=-1)
    """Number of optimizer steps; above 0 it replaces `num_train_epochs`."""
    per_device_train_batch_size: Annotated[Integer, Field(ge=1)] | Literal["auto"] = _ROWS
    """Rows per device in one forward and backward pass; `auto` takes as many as fit, and accumulates the others of the
    8 times `gradient_accumulation_steps` rows of a step."""
    group_by_length: Flag = False
    """Put rows of like length into one batch: less padding, at the price of a less random order."""
    max_tokens_per_batch: Integer | None = Field(default=None, ge=2)
    """Batches of so many tokens, padding included, instead of a number of rows: as many rows as fit."""
    per_device_eval_batch_size: Integer = Field(default=8, ge=1)
    """Rows per device in one evaluation pass."""
    gradient_accumulation_steps: Integer = Field(default=1, ge=1)
    """Passes whose gradients are added up before one step: the same as one large batch, whatever the rows' lengths."""
    gradient_checkpointing: Flag = False
    """Keep only layer inputs in memory and compute the rest again in backward: about a third more time."""
    on_out_of_memory: Literal["stop", "shrink"] = "stop"
    """Where a step runs out of memory: stop, or make it again in passes of half the rows, and all later ones."""
    bf16: FlagOrAuto = "auto"
    """Compute in bfloat16 by autocast; weights stay in `model.dtype`."""
    fp16: FlagOrAuto = "auto"
    """Compute in float16 by autocast with a loss scaler; GPU only."""
    tf32: FlagOrAuto = "auto"
    """Let float32 matrix products run in TF32 (Ampere and newer GPUs)."""
    optim: Text = "adamw_torch"
    """The optimizer, by Hugging Face's name."""
    optim_args: dict[str, Any] = Field(default_factory=dict)
    """That optimizer's own options; `ftune explain OPTIM` lists them."""
    learning_rate: NumberOrAuto = "auto"
    """Peak learning rate; `auto` takes the customary one for this optimizer and tuning."""
    weight_decay: NotNegative = 0.0
    """Decay of weight matrices; biases and norms are left out, as usual."""
    max_grad_norm: NumberOrAuto = "auto"
    """Clip the global gradient norm to this; 0 turns clipping off."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = "linear"
    """How the learning rate goes from its peak to its end."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """That schedule's own options, such as `num_cycles`; `ftune explain cosine` lists those of cosine."""
    warmup_steps: NotNegative = 0.0
    """Steps over which the learning rate rises; below 1 a fraction of all steps."""
    label_smoothing_factor: Fraction = 0.0
    """How much of the target probability is spread over the whole vocabulary."""
    neftune_noise_alpha: Positive | None = None
    """Strength of the uniform noise added to the embeddings while training (NEFTune)."""
    torch_compile: Flag = False
    """Compile the model with torch.compile: slower to start, often faster after."""
    dataloader_num_workers: Integer = Field(default=0, ge=0)
    """Processes that prepare batches beside the training process."""
    dataloader_pin_memory: FlagOrAuto = "auto"
    """Prepare batches in page-locked memory, so that they copy to a GPU in the background."""
    dataloader_prefetch_factor: Integer | None = Field(default=None, ge=1)
    """Batches each worker prepares ahead."""
    seed: Integer = Field(default=42, ge=0, lt=2**32)
    """Starts every random choice: the same seed gives the same run, digit for digit on a CPU."""
    logging_steps: Integer = Field(default=10, ge=1)
    """Steps between two lines of metrics."""
    eval_strategy: Literal["auto", "no", "steps", "epoch"] = "auto"
    """When to evaluate; `auto` is every epoch when there are evaluation rows. One comes before and one after anyway."""
    eval_steps: Positive | None = None
    """Steps between evaluations; below 1 a fraction of all steps."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to write a checkpoint from which the run can go on."""
    save_steps: Positive = 500
    """Steps between checkpoints; below 1 a fraction of all steps."""
    save_total_limit: Integer | None = Field(default=2, ge=1)
    """How many checkpoints are kept; the best one is kept besides. null keeps all."""
    load_best_model_at_end: Flag = False
    """End with the weights of the lowest evaluation loss instead of the last ones."""
    early_stopping_patience: Integer | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a lower loss."""
    early_stopping_threshold: NotNegative = 0.0
    """How much lower counts as lower."""
    sample_prompts: list[str] | None = None
    """Prompts the model answers before, during and after; null takes three of the evaluation rows, [] none."""
    sample_max_new_tokens: Integer = Field(default=64, ge=1)
    """Longest such answer in tokens."""
    report_to: Tracker | list[Tracker] = "none"
    """Trackers besides the run directory, such as tensorboard or wandb."""
    run_name: Text | None = None
    """What a tracker calls the run."""

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch; the default, as long as it is open how many fit."""
        rows = self.per_device_train_batch_size
        return _ROWS if rows == "auto" else rows

    @property
    def trackers(self) -> list[str]:
        """The trackers asked for."""
        wanted = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in wanted if name != "none"]


class Distributed(Options):
    """Where the state lives."""

    zero_stage: Integer = Field(default=0, ge=0, le=3)
    """What is split over the devices: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer state waits between steps."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Where weights wait between uses (stage 3)."""
    engine: Literal["auto", "ddp", "deepspeed", "fsdp"] = "auto"
    """What carries it."""

    @property
    def splits_weights(self) -> bool:
        """Whether each of several ranks holds only its rows of the weights between steps."""
        return self.zero_stage >= 2


@dataclass(frozen=True)
class Chosen:
    """A plugin named by the recipe, with its validated options."""

    method: str
    options: Any

    def as_dict(self) -> dict[str, Any]:
        return {"method": self.method, **self.options.model_dump()}


@dataclass(frozen=True)
class Recipe:
    """The six sections, each frozen; `optimizer` is `training.optim` with `training.optim_args` read by its plugin."""

    model: Model
    data: Data
    objective: Chosen
    tuning: Chosen
    training: Training
    distributed: Distributed
    optimizer: Chosen

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON-able data that `from_dict` reads back."""
        return {
            "model": self.model.model_dump(),
            "data": self.data.model_dump(),
            "objective": self.objective.as_dict(),
            "tuning": self.tuning.as_dict(),
            "training": self.training.model_dump(),
            "distributed": self.distributed.model_dump(),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Recipe:
        """Return the recipe that `as_dict` gave; raises pydantic.ValidationError where it is none."""
        training = Training(**data["training"])
        optimizer = plugin.optimizer(training.optim)
        return Recipe(
            model=Model(**data["model"]),
            data=Data(**data["data"]),
            objective=_choose(plugin.OBJECTIVES, data["objective"]),
            tuning=_choose(plugin.TUNINGS, data["tuning"]),
            training=training,
            distributed=Distributed(**data["distributed"]),
            optimizer=Chosen(training.optim, optimizer.Options(**training.optim_args)),
        )


def listed(value: str | list[str | Source] | float | None) -> tuple[Source, ...]:
    """Return what `data.train` or `data.eval` names; a fraction names nothing."""
    if value is None or isinstance(value, (int, float)):
        return ()
    items = [value] if isinstance(value, str) else value
    return tuple(item if isinstance(item, Source) else Source(path=item) for item in items)


def _choose(package: str, section: dict[str, Any]) -> Chosen:
    options = {key: value for key, value in section.items() if key != "method"}
    return Chosen(section["method"], plugin.get(package, section["method"]).Options(**options))


SECTIONS: dict[str, type[Options] | None] = {
    "model": Model,
    "data": Data,
    "objective": None,
    "tuning": None,
    "training": Training,
    "distributed": Distributed,
}
"""The sections in order; None where the plugin named by `method` has the say."""

PLUGIN_SECTIONS = {"objective": (plugin.OBJECTIVES, "sft"), "tuning": (plugin.TUNINGS, "full")}
"""Section: (kind of plugin, the method when none is named)."""
