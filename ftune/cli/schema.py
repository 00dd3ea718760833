"""`ftune schema`: the JSON Schema of a recipe, for editors."""


def schema() -> None:
    """Print the JSON Schema of a recipe, so that an editor completes and checks it.

    Example: ftune schema > recipe.schema.json
    """
    import json

    from ftune.recipe.reference import json_schema

    print(json.dumps(json_schema(), indent=2))
