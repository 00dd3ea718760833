"""What the audit of the rows can find, by name; formats add findings of their own."""

from __future__ import annotations

import difflib
from functools import cache

from ftune import plugin
from ftune.errors import Place, Problem
from ftune.plugin import Finding

ROW_FINDINGS = (
    Finding(
        "no-answer",
        "hold no learned token and were left out",
        "no assistant turn, only empty ones, or all marked as not trained",
        "look at their roles, or remove them",
    ),
    Finding(
        "answer-cut-off",
        "begin their answer beyond data.max_length and were left out",
        "what is asked alone fills the row",
        "raise data.max_length, or shorten the prompts",
    ),
    Finding(
        "cut",
        "are longer than data.max_length and were cut",
        "the end of their answer, with the mark that ends it, is lost",
        "raise data.max_length, or split the rows",
    ),
    Finding(
        "never-stops",
        "teach no end mark",
        "a model that never learns its end-of-turn token goes on until it is cut off",
        "set data.chat_template to one that writes a special token after each answer, such as <|im_end|>",
    ),
    Finding(
        "begins-twice",
        "begin with the begin mark twice",
        "the text holds the mark that the template or the tokenizer writes already; at inference there is one",
        "take the mark out of the rows or of data.chat_template",
    ),
    Finding(
        "pad-learned",
        "hold the padding token as something to learn",
        "the model would learn to write what stands for nothing",
        "take the token out of the rows",
    ),
    Finding(
        "empty-answer",
        "hold an empty answer",
        "it is not learned; as history it teaches that silence is an answer",
        "remove these turns",
    ),
    Finding(
        "broken-text",
        "hold broken letters",
        "text was decoded with the wrong encoding once, as `\\u00c3\\u00a9` for `\\u00e9`, or holds control characters",
        "decode the source again; the Python package ftfy repairs most",
    ),
    Finding(
        "mark-in-text",
        "spell a special token of the tokenizer in their text",
        "the model reads it as the mark itself: whoever quotes an end of turn ends the turn, and speaks for others",
        "take the token out of the rows, or spell it otherwise",
    ),
    Finding(
        "unprompted",
        "answer another text than generation would be given",
        "what stands before the last answer is not what the chat template writes when it asks for one",
        "set data.chat_template to one that writes a turn in training as it asks for it in use",
    ),
    Finding(
        "joined",
        "have a token that spans the end of the prompt and the start of the answer",
        "it was divided there, as it is when the prompt stands alone; the model has seldom seen the two halves",
        "let no prompt end with a blank, and no answer begin with a line break",
    ),
    Finding(
        "rewritten",
        "have an answer that the chat template writes otherwise",
        "many templates leave out the thinking of earlier turns; what they write is what is learned",
        "data.train_on_turns: last learns the last answer alone, which is written whole",
        severity="note",
    ),
)

SET_FINDINGS = (
    Finding(
        "duplicate",
        "are exact copies of earlier ones",
        "they count several times",
        "remove them, if that is not wanted",
    ),
    Finding(
        "near-duplicate",
        "are nearly the same as an earlier one",
        "they count several times: of their tokens in fives, four fifths are the same",
        "remove them, if that is not wanted",
    ),
    Finding(
        "train-in-eval",
        "are rows of training too, or nearly",
        "eval_loss would only say that they were learned by heart",
        "remove them from one of the two",
    ),
)


@cache
def known_findings() -> dict[str, Finding]:
    """Return every finding there is by its name, those of the formats too."""
    formats = [plugin.format_named(name) for name in plugin.names(plugin.FORMATS)]
    every = (*ROW_FINDINGS, *SET_FINDINGS, *(found for each in formats for found in each.findings))
    return {finding.kind: finding for finding in every}


def unknown_finding(kind: str, where: Place | None = None) -> Problem | None:
    """Return the problem of a name that no finding has; None for one that has."""
    if kind in known_findings():
        return None
    near = difflib.get_close_matches(kind[:80], known_findings(), n=1)
    label = f"did you mean `{near[0]}`?" if near and where else ""
    # Without a line to stand beside, the guess is the fix.
    fix = f"did you mean {near[0]}?" if near and not where else "known are " + ", ".join(known_findings())
    return Problem("unknown-finding", f"there is no finding `{kind}`", where, label, fix=fix)
