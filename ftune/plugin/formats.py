"""How rows on disk are read: what a row is, and the facts of a format."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ftune.plugin.base import Plugin


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str
    trained: bool = True
    """Whether an assistant turn counts in the loss (a row's own `train: false` or `weight: 0` says no)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of the message (tool calls, names), handed to the chat template as they are."""

    def as_message(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class PlainText:
    """A prompt that is continued as it stands, without a chat template: what plain rows were trained as."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """A row for supervised learning: what to say (trained) after what was said (not trained).

    Either `turns`, rendered with the chat template, or plain `prompt` + `completion` text without one.
    """

    turns: tuple[Turn, ...] = ()
    prompt: str = ""
    completion: str = ""
    tools: tuple[Any, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else the row says and an objective may ask for: a label, or what a reward function compares with."""


class RowError(ValueError):
    """A row is not what its format says; the caller adds the file and the row number."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


@dataclass(frozen=True)
class Finding:
    """One kind of thing that the audit finds in rows."""

    kind: str
    what: str
    """Said of the rows it was found in, after their number: "rows hold no learned token"."""
    why: str
    fix: str
    severity: Literal["fatal", "warning", "note"] = "warning"
    """`fatal` stops the run."""


class Format(Plugin):
    """How rows on disk are read."""

    columns: ClassVar[str]
    """What a row looks like, for messages and documentation."""
    views: ClassVar[tuple[str, ...]] = ("",)
    """The texts made of a row, by name: a preference row is two. An unnamed one is the row itself."""
    teaches: ClassVar[bool] = True
    """Whether its rows hold something to learn; prompts alone do not."""
    findings: ClassVar[tuple[Finding, ...]] = ()
    """What can be wrong with rows of this format alone."""
    loss_setting: ClassVar[str] = "assistant_only_loss"
    """Which key of `data` says whether only answers are learned."""
    trains_whole_text: ClassVar[bool] = False
    """Plain text: every token counts in the loss."""
    templated: ClassVar[bool | None] = True
    """Whether the chat template writes its rows; None where each row says."""

    @abstractmethod
    def detect(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row has this format's columns."""

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Conversation:
        """Return the row as a conversation (its first view); raise RowError with what is wrong."""

    def read_views(self, row: Mapping[str, Any]) -> tuple[Conversation, ...]:
        """Return one conversation for each of `views`; raise RowError with what is wrong."""
        return (self.read(row),)

    def remarks(self, views: tuple[Conversation, ...]) -> Iterable[str]:
        """Yield the kind of each of `findings` that holds for a row."""
        return ()
