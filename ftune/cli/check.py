"""`ftune check`: validate a recipe; print every problem and every decision."""

from typing import Annotated

import typer


def check(
    recipe: Annotated[str, typer.Argument(help="The recipe file.", metavar="RECIPE")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: section.key=value.", metavar="S.K=V")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print problems and decisions as JSON.")] = False,
) -> None:
    """Validate a recipe: every problem at once, and every value ftune chose with its reason.

    Example: ftune check recipe.yaml --set training.learning_rate=1e-4
    """
    import json
    import sys
    from dataclasses import asdict

    from ftune.cli import console
    from ftune.errors import FtuneError, Problem
    from ftune.machine import probe
    from ftune.resolve import Decision, examine, raise_errors, resolve

    machine = probe()
    problems: list[Problem] = []
    decisions: tuple[Decision, ...] = ()
    failure: FtuneError | None = None
    try:
        loaded, problems = examine(recipe, override or (), machine)
        if loaded is not None:
            decisions = resolve(loaded, machine, fingerprints=False).decisions
        raise_errors(problems)
    except FtuneError as error:
        failure, problems = error, problems or list(error.problems)
    if as_json:
        answer = {
            "problems": [console.problem_as_json(problem) for problem in problems],
            "decisions": [asdict(decision) for decision in decisions],
        }
        print(json.dumps(answer, indent=2))
    else:
        console.print_problems(problems, stream=sys.stderr)
        if failure is None:
            print(f"{recipe} is a recipe that can be trained here. ftune chose:")
            console.print_decisions(decisions)
    if failure is not None:
        raise typer.Exit(failure.exit_code)
