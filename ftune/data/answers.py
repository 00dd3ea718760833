"""Where an answer stands in the text that a chat template made of its conversation.

Found by difference: what rendering turn i adds to the prompt before it is the answer. `{% generation %}` marks are
never used, since most templates have none and an absent mark silently learns nothing. Many templates write history
anew: they drop earlier thinking, move the tools, end the last turn otherwise. There a sentinel behind a turn's content
shows where it ends, and what follows is compared with what follows it when the turn is the last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ftune.plugin import RowError, Turn

_SPEECH = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys besides `content` in which a model speaks: a turn that has one is not empty."""


@dataclass(frozen=True)
class Answer:
    """Where a turn stands, with the mark that ends it."""

    start: int
    end: int
    rewritten: bool
    """The template does not write the turn's content as it is, such as its thinking."""
    opened: bool
    """It begins where generation would begin it."""


@dataclass(frozen=True)
class Page:
    """A conversation, the text made of it, and how other conversations would be written."""

    text: str
    turns: tuple[Turn, ...]
    write: Callable[[Sequence[Turn], bool], str | None]
    """The template: turns, and whether the heading of an answer follows. None where it refuses them."""
    marks: Callable[[], tuple[str, ...]]
    """The texts of the tokenizer's special tokens."""

    def answer(self, index: int) -> Answer | None:
        """Return where turn `index` stands; None where the template writes nothing of it but its marks."""
        turn, last = self.turns[index], index + 1 == len(self.turns)
        before = self.write(self.turns[:index], True) if index else None
        opened = before is not None and self.text.startswith(before)
        start = len(before) if opened and before is not None else self._start(index, before)
        alone = self.text if last else self.write(self.turns[: index + 1], False)
        span = self._as_when_last(start, before, alone) or self._by_sentinel(index, start)
        span = span or self._without_its_beginning(start, before, alone)
        if span is None:
            raise _not_found(index, turn)
        if not self.text[slice(*span)].strip():
            raise left_out(index, turn)
        return self._trimmed(index, span, opened)

    def _as_when_last(self, start: int, before: str | None, alone: str | None) -> tuple[int, int] | None:
        """Return the turn's place where it is written as it was when nothing followed: nearly always."""
        if before is None or alone is None or not alone.startswith(before):
            return None
        end = start + len(alone) - len(before)
        return (start, end) if self.text[start:end] == alone[len(before) :] else None

    def _by_sentinel(self, index: int, start: int) -> tuple[int, int] | None:
        """Return the turn's place: its content ends before what a sentinel there is followed by."""
        turn = self._marked(self.turns[index])
        tail = self._tail(turn, (*self.turns[:index], turn, *self.turns[index + 1 :]), heading=False)
        if tail is None or not self.text.endswith(tail):
            return None
        content_end = len(self.text) - len(tail)
        if index + 1 == len(self.turns):
            return start, len(self.text)
        alone = self._tail(turn, (*self.turns[:index], turn), heading=False)
        length = 0 if alone is None else self._common(tail, alone)
        if not tail[:length].strip():
            length = self._first_mark(tail) or length
        if alone is None and not length:
            return None
        # A sentinel in an empty content may bring a line break of its own, which then seems to be the heading's.
        return start, max(start, content_end + length)

    def _without_its_beginning(self, start: int, before: str | None, alone: str | None) -> tuple[int, int] | None:
        """Return the place of a turn without content that lost what it began with, such as thinking before a call."""
        if before is None or alone is None or not alone.startswith(before):
            return None
        written = alone[len(before) :]
        for cut in range(1, len(written.rstrip())):
            if self.text.startswith(written[cut:], start):
                return start, start + len(written) - cut
        return None

    def _start(self, index: int, before: str | None) -> int:
        """Return where a turn begins that follows another prompt than generation would be given."""
        found = None
        if index and before is not None:
            previous = self._marked(self.turns[index - 1])
            earlier = (*self.turns[: index - 1], previous)
            asked = self._tail(previous, earlier, heading=True)
            tail = self._tail(previous, (*earlier, *self.turns[index:]), heading=False)
            if asked is not None and tail is not None and self.text.endswith(tail):
                found = len(self.text) - len(tail) + self._common(tail, asked)
                if tail.startswith(asked):
                    return found
        turn = replace(self.turns[index], content=self.sentinel)
        whole = self.write((*self.turns[:index], turn, *self.turns[index + 1 :]), False) or ""
        head, mark, _ = whole.partition(turn.content)
        if mark and self.text.startswith(head):
            return len(head)
        if found is None:
            raise _not_found(index, self.turns[index])
        return found

    def _trimmed(self, index: int, span: tuple[int, int], opened: bool) -> Answer | None:
        """Leave out blanks after the end-of-turn mark: a model stops at the mark and never gets to write them.

        Where the template has no mark, the blanks are what ends the turn, and stay.
        """
        (start, end), turn = span, self.turns[index]
        written, content = self.text[start:end], turn.content.strip()
        at = written.find(content)
        content_end = start + at + len(content)
        # The mark may look like a short answer, and thinking may hold the answer too.
        if not content or at < 0 or at != written.rfind(content):
            content_end = self._content_end(index, start, end)
        if not self._says_something(index, self.text[start:content_end], written):
            return None
        if self.text[content_end:end].strip():
            end = start + len(written.rstrip())
        return Answer(start, end, rewritten=content not in written, opened=opened)

    def _says_something(self, index: int, content: str, written: str) -> bool:
        """Return whether anything of a turn is written: content, a call or thinking; refuse a call that is left out."""
        turn = self.turns[index]
        calls = [call.get("function", call) for call in turn.extra.get("tool_calls") or () if isinstance(call, Mapping)]
        names = [call["name"] for call in calls if isinstance(call, Mapping) and isinstance(call.get("name"), str)]
        if lost := [name for name in names if name not in written]:
            raise RowError(
                f"the chat template leaves out the call of `{lost[0]}` in turn {index + 1}",
                "it knows no tools: leave such turns out of the row, or set data.chat_template to one that writes them",
            )
        if names or turn.content.strip():
            return bool(names or content.strip())
        # Not by looking for the words: the template may write the same ones, as its mark is, for another reason.
        thoughts = [value for key in _SPEECH if isinstance(value := turn.extra.get(key), str)]
        silent = replace(turn, extra={key: value for key, value in turn.extra.items() if key not in _SPEECH})
        return (
            any(map(str.strip, thoughts))
            and self.write((*self.turns[:index], silent, *self.turns[index + 1 :]), False) != self.text
        )

    def _content_end(self, index: int, start: int, end: int) -> int:
        turn = self._marked(self.turns[index])
        tail = self._tail(turn, (*self.turns[:index], turn, *self.turns[index + 1 :]), heading=False)
        known = tail is not None and self.text.endswith(tail)
        place = len(self.text) - len(tail) if known and tail is not None else start
        return min(max(place, start), end)

    def _marked(self, turn: Turn) -> Turn:
        return replace(turn, content=turn.content.rstrip() + self.sentinel)

    def _tail(self, marked: Turn, turns: Sequence[Turn], *, heading: bool) -> str | None:
        """Return what follows the sentinel of a marked turn; None where the template does not write it once."""
        whole = self.write(turns, heading) or ""
        _, found, tail = whole.partition(self.sentinel)
        return tail if found and self.sentinel not in tail else None

    @cached_property
    def sentinel(self) -> str:
        """A text that occurs nowhere, not even in what the template drops."""
        known = self.text + repr(self.turns)
        return next(mark for number in itertools.count() if (mark := f"@@ANSWER-{number}@@") not in known)

    def _common(self, one: str, other: str) -> int:
        """Return how far two texts agree, not counting a special token that only begins alike."""
        pairs = zip(one, other, strict=False)
        length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if length == len(one) or length == len(other):
            return length
        inside = (
            length - back
            for mark in self.marks()
            for back in range(1, min(len(mark), length + 1))
            if one.startswith(mark, length - back) or other.startswith(mark, length - back)
        )
        return min(inside, default=length)

    def _first_mark(self, tail: str) -> int | None:
        """Return the end of the special token that a text begins with."""
        blanks = len(tail) - len(tail.lstrip())
        return max((blanks + len(mark) for mark in self.marks() if tail.startswith(mark, blanks)), default=None)


def left_out(index: int, turn: Turn) -> RowError:
    """Return the error for a turn of which the template writes nothing."""
    fix = "leave it out of the row, or set data.chat_template to one that writes it"
    if turn.role in ("system", "developer"):
        fix = "put it at the head of the first user turn, or set data.chat_template to one that writes it"
    return RowError(f"the chat template leaves out turn {index + 1}, of the role `{turn.role}`", fix)


def is_learned(turn: Turn) -> bool:
    """Return whether there is something to learn; an empty answer would teach silence."""
    return turn.role == "assistant" and turn.trained and (bool(turn.content.strip()) or _speaks(turn))


def _speaks(turn: Turn) -> bool:
    return any(turn.extra.get(key) for key in _SPEECH)


def _not_found(index: int, turn: Turn) -> RowError:
    return RowError(
        f"cannot find turn {index + 1}, of the role `{turn.role}`, in what the chat template makes of it",
        "the template rewrites answers: set data.chat_template to one that writes them as they are",
    )
