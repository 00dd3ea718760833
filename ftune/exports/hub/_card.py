"""The model card: what a run's files say of where the model comes from."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ftune import __version__, rundir
from ftune.models.source import public_name
from ftune.places import PACKAGE, expanded, package_folder
from ftune.units import format_bytes, format_count, format_duration

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write(source: Any, folder: Path, dtype: str) -> None:
    """Write README.md; names of folders on this machine are cut to their last part."""
    recipe = source.spec.recipe if source.spec is not None else None
    result = _result(source.run_directory)
    name = source.run_directory.resolve().name
    base = _base(source, recipe)
    sources = _sources(recipe)
    hub_data = [path for path in sources if not _is_local(path)]
    data = ModelCardData(
        model_name=name,
        base_model=base["hub"],
        license=base["license"],
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=hub_data or None,
        tags=["ftune", *([recipe.objective.method, recipe.tuning.method] if recipe is not None else [])],
        eval_results=_evaluation(result, hub_data),
    )
    shown = [_shown(path) for path in sources]
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        base=base,
        recipe=recipe,
        recipe_text=_without_folders(source.spec.recipe_text, recipe) if recipe is not None else "",
        overrides=source.spec.overrides if source.spec is not None else (),
        sources=shown,
        fingerprints=_fingerprints(source.spec),
        result=result,
        seconds=format_duration(result["wall_seconds"]) if result.get("wall_seconds") else "",
        peak=format_bytes(result["peak_memory_bytes"]) if result.get("peak_memory_bytes") else "",
        parameters=format_count(source.parameters),
        dtype=dtype,
        template=bool(source.tokenizer.chat_template),
        hardware=_hardware(source),
        versions={"ftune": __version__, **(source.spec.versions if source.spec is not None else {})},
    )
    (folder / "README.md").write_text(str(card) + "\n", encoding="utf-8")


def _result(run: Path) -> dict[str, Any]:
    path = run / rundir.RESULT
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _base(source: Any, recipe: Any) -> dict[str, str | None]:
    """Return how the initial model is called, its name on the hub, and its licence, as far as they are known."""
    if recipe is None:
        return {"name": None, "hub": None, "license": None}
    model = recipe.model
    name = model.gguf_file or _shown(model.model_name_or_path)
    return {"name": name, "hub": public_name(model), "license": _license(model.model_name_or_path, source.folder)}


def _license(name: str, folder: Path) -> str | None:
    """Return the licence that a base's own card or package states; None where neither does."""
    if name.startswith(PACKAGE):
        said = _package_license(name)
        return said.lower() if said else None
    places = [expanded(name) / "README.md", folder / "README.md"]
    for card in places:
        if card.is_file():
            return ModelCard.load(card, ignore_metadata_errors=True).data.license
    return None


def _package_license(name: str) -> str | None:
    if package_folder(name) is None:
        return None
    for distribution in importlib.metadata.packages_distributions().get(name.removeprefix(PACKAGE), ()):
        known = importlib.metadata.metadata(distribution)
        return known.get("License-Expression") or known.get("License")
    return None


def _sources(recipe: Any) -> list[str]:
    if recipe is None:
        return []
    train = recipe.data.train
    return [train] if isinstance(train, str) else [one if isinstance(one, str) else one.path for one in train]


def _is_local(path: str) -> bool:
    return expanded(path).exists() or "/" not in path or path.startswith(("/", ".", "~")) or path.count("/") > 1


def _shown(path: str) -> str:
    return Path(path).name if _is_local(path) else path


def _fingerprints(spec: Any) -> dict[str, str]:
    found = spec.data_fingerprint if spec is not None else {}
    return {Path(path).name: sha256 for path, sha256 in found.items()}


def _evaluation(result: dict[str, Any], datasets: list[str]) -> list[EvalResult] | None:
    if result.get("eval_loss") is None:
        return None
    name = datasets[0] if datasets else "held-out rows"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type="loss",
            metric_value=round(result["eval_loss"], 4),
            metric_name="Cross-entropy a token",
        )
    ]


def _hardware(source: Any) -> list[str]:
    path = source.run_directory / rundir.ENVIRONMENT
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [line.removeprefix("# ") for line in lines if line.startswith("# ")]


def _without_folders(text: str, recipe: Any) -> str:
    """Return the recipe's text with its own absolute paths cut to their last part: whose they are is not public."""
    paths = [recipe.model.model_name_or_path, recipe.training.output_dir, *_sources(recipe)]
    evaluated = recipe.data.eval
    paths += [evaluated] if isinstance(evaluated, str) else []
    for path in sorted((path for path in paths if Path(path).is_absolute()), key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return text.replace(str(Path.home()), "~").strip()
