"""What the model answers to fixed prompts before, during and after: the part of a run that a person can judge."""

from __future__ import annotations

import json
from typing import Any

from transformers import TrainerCallback

from ftune import rundir
from ftune.data.detect import reads_plain_text
from ftune.models.generate import Prompt, generate_answers
from ftune.plugin import PlainText
from ftune.recipe.schema import Data
from ftune.training.progress import Progress
from ftune.training.trainer import FtuneTrainer


class Samples(TrainerCallback):  # type: ignore[misc]
    """Asks at each evaluation; keeps every answer in `samples.jsonl` and shows the first beside the last."""

    def __init__(self, prompts: tuple[Prompt, ...], progress: Progress) -> None:
        self.prompts = prompts
        self.progress = progress
        self.trainer: FtuneTrainer | None = None
        self.before: list[str] = []

    def ask(self, when: str) -> list[str]:
        """Let the model answer all prompts and keep the answers; only the first rank does.

        Ranks that share the weights compute every answer together.
        """
        trainer = self.trainer
        if trainer is None or not self.prompts or not (trainer.is_world_process_zero() or trainer.is_split):
            return []
        recipe = trainer.recipe
        self.prompts = _as_trained(self.prompts, recipe.data)
        with trainer.aside(), trainer.accelerator.autocast():
            model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
            answers = generate_answers(
                model,
                trainer.processing_class,
                self.prompts,
                recipe.training.sample_max_new_tokens,
                together=trainer.is_split,
            )
        if not trainer.is_world_process_zero():
            return []
        with (trainer.directory / rundir.SAMPLES).open("a", encoding="utf-8") as file:
            for prompt, answer in zip(self.prompts, answers, strict=True):
                step = trainer.state.global_step
                row = {"step": step, "when": when, "prompt": as_data(prompt), "answer": answer}
                # Messages of a Parquet file may carry times and other values that JSON has no word for.
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        return answers

    def forget_after(self, step: int) -> None:
        """Drop the answers of beyond the checkpoint a run goes on from; keep those of before it began."""
        assert self.trainer is not None
        path = self.trainer.directory / rundir.SAMPLES
        rows = rundir.read_whole_lines(path)
        kept = [row for row in rows if row["step"] <= step and row["when"] != "after"]
        self.before = [row["answer"] for row in kept if row["when"] == "before"]
        if rows:
            rundir.write_lines(path, kept)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if 0 < state.global_step < state.max_steps:
            self.ask("during")

    def show(self, after: list[str]) -> None:
        """Print each prompt with the answers before and after."""
        for index, (prompt, answer) in enumerate(zip(self.prompts, after, strict=False)):
            data = as_data(prompt)
            text = data if isinstance(data, str) else str(data[-1]["content"])
            before = f"  before: {_one_line(self.before[index])}\n" if index < len(self.before) else ""
            self.progress.say(f"{_one_line(text)}\n{before}  after:  {_one_line(answer)}")


def _as_trained(prompts: tuple[Prompt, ...], data: Data) -> tuple[Prompt, ...]:
    """Return the prompts, the recipe's own texts among them as plain text where that is what was learned."""
    if not any(isinstance(prompt, str) for prompt in prompts) or not reads_plain_text(data):
        return prompts
    return tuple(PlainText(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)


def as_data(prompt: Prompt) -> Any:
    """Return a prompt as JSON-able data: text, or its messages."""
    if isinstance(prompt, PlainText):
        return prompt.text
    return prompt if isinstance(prompt, str) else [turn.as_message() for turn in prompt.turns]


def _one_line(text: str, limit: int = 200) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."
