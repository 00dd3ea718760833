"""`ftune explain`: any key, section, rule or method."""

from typing import Annotated

import typer


def explain(
    name: Annotated[str | None, typer.Argument(help="A key, section, rule or method.", metavar="[NAME]")] = None,
) -> None:
    """Explain a key, a section, a rule, or a method; without a name, list what there is.

    Example: ftune explain learning_rate
    """
    from ftune.rules.explanations import explain_name, overview

    print(overview() if name is None else explain_name(name))
