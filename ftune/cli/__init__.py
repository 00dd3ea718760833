"""The Typer app: the commands in help order, and what happens to an error."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer

from ftune import __version__
from ftune.cli import (
    chat,
    check,
    doctor,
    explain,
    export,
    init,
    launch,
    merge,
    plan,
    preview,
    rebuild,
    report,
    resume,
    schema,
    train,
)

# Plain help is faster, greppable, and safe on pipes that are not UTF-8.
app = typer.Typer(
    name="ftune",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Fine-tune language models from one YAML recipe, on the GPU you have.\n\n"
    "Example: ftune init && ftune train recipe.yaml",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ftune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Hold the options that stand before a command."""


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that says it was interrupted: Typer itself leaves with 130 and no word."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


_COMMANDS: tuple[Callable[..., None], ...] = (
    *(
        init.init,
        check.check,
        plan.plan,
        preview.preview,
        train.train,
        launch.launch,
        resume.resume,
        chat.chat,
        merge.merge,
        export.export,
    ),
    *(rebuild.rebuild, report.report, explain.explain, schema.schema, doctor.doctor),
)
for command in _COMMANDS:
    app.command()(_interruptible(command))


def main() -> None:
    """Run a command; print what a user can mend without a traceback, and save a report of what only we can."""
    from ftune.cli import streams
    from ftune.errors import FtuneError
    from ftune.models.quiet import hush_imports

    streams.make_lasting()
    hush_imports()
    try:
        app()
    except FtuneError as error:
        from ftune.cli import console

        console.print_problems(error.problems)
        sys.exit(error.exit_code)
    except Exception:
        from ftune.cli import crash

        sys.exit(crash.report())
