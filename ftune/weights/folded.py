"""The weights of a finished run with its adapter folded in, one tensor at a time or of a model in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ftune.adapters.pooled import fold_pooled
from ftune.errors import Problem, RecipeError, RunError
from ftune.models.finished import Finished, attach
from ftune.models.quiet import quiet
from ftune.models.source import config_of
from ftune.quantized.linear import QuantizedLinear
from ftune.quantized.model import codes_of, dequantised
from ftune.tensor_files import damaged
from ftune.weights.files import NAMES, Files
from ftune.weights.skeleton import NotStreamable, absent, filled, located, skeleton, ties


class Weights(Protocol):
    """What a format writes: whole weights by their names in the model."""

    model: Any
    """The module they belong to; its weights may be absent."""

    def names(self) -> list[str]:
        """Return the names in the module's order; a weight that two modules share has one."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape."""

    def read(self, name: str) -> torch.Tensor:
        """Return a weight; in float32 where an adapter was folded in, else as it is stored."""

    def save(self, folder: Path, dtype: str, max_shard_size: str) -> None:
        """Write safetensors and configuration, as `save_pretrained` would."""


@dataclass(frozen=True)
class _Part:
    """A module that an adapter changes."""

    path: str
    module: Any
    base: Any
    """The original module inside it."""
    fold: Callable[[], Any]
    """Return the module whose weights take the place of the original's, which are there while it is called."""


class Streamed:
    """Weights read from the base's files when they are asked for, those of a changed module folded then.

    PEFT folds each module by itself, as it does where the whole model is in memory. Memory: the adapter, and the
    largest module in float32. Raises NotStreamable where files and modules do not correspond one to one.
    """

    def __init__(self, found: Finished, folder: Path) -> None:
        """Read nothing yet but names, shapes and the adapter."""
        name = found.model.model_name_or_path
        config = config_of(folder, name)
        if "auto_map" in config:
            raise NotStreamable("the model comes with its own code")
        if "quantization_config" in config:
            raise NotStreamable("the model's weights are quantised")
        if found.is_coded:
            raise NotStreamable("the adapter belongs to codes, not to the weights of the base's files")
        if found.fits_rounded_base:
            raise NotStreamable("the adapter belongs to the rounded weights of its base")
        self.files = Files(folder, name)
        self.folder = folder
        self.model = skeleton(str(folder))
        self._keys = located(self.model, self.files)
        self._shapes = {name: tuple(weight.shape) for name, weight in self.model.state_dict().items()}
        self._ties = ties(self.model)
        for name, buffer in self.model.named_buffers():
            if name in self._keys:
                buffer.copy_(self.files.read(self._keys[name]))
        self.adapted = self.model if found.base is None else attach(self.model, found.folder, assign=True)
        self.parts = {} if found.base is None else {part.path: part for part in _parts(self.adapted, found.folder)}
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self._untied = self._find_untied()

    def names(self) -> list[str]:
        return [name for name in self._shapes if name in self._untied or self._ties.get(name, name) == name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        path = self.part_of(name)
        if path is None:
            return self.stored(name)
        if self._last[0] != path:
            self._last = ("", {})  # before the next is folded: only one is in memory
            self._last = (path, self._fold(self.parts[path]))
        return self._last[1][name]

    def stored(self, name: str) -> torch.Tensor:
        """Return a weight as it is in the base's files."""
        return self.files.read(self._keys[name])

    def part_of(self, name: str) -> str | None:
        """Return the path of the changed module that a weight belongs to."""
        path = name
        while path:
            if path in self.parts:
                return path
            path = path.rpartition(".")[0]
        return None

    @torch.no_grad()
    def _fold(self, part: _Part) -> dict[str, torch.Tensor]:
        own = [(weight, weight.data) for weight in part.base.parameters() if not absent(weight)]
        with filled(part.base, part.path + ".", self.stored):
            whole = _folded(part.fold)
            values = {f"{part.path}.{name}": value.detach() for name, value in whole.state_dict().items()}
        for weight, before in own:  # an adapter may bring its base's embeddings along
            weight.data = before
        return values

    def _find_untied(self) -> set[str]:
        """Return the names that no longer share one weight, since the adapter changed them apart."""
        shared = {*self._ties.values()}
        untied: set[str] = set()
        for kept in shared:
            names = [name for name, other in self._ties.items() if other == kept]
            if any(self.part_of(name) is not None for name in names):
                first = self.read(kept).to(torch.float32)
                if not all(torch.equal(first, self.read(name).to(torch.float32)) for name in names):
                    untied.update(names)
        return untied

    def save(self, folder: Path, dtype: str, max_shard_size: str) -> None:
        from ftune.weights.shards import write_shards

        write_shards(self, folder, dtype, max_shard_size)
        config = self.model.config
        config.dtype = NAMES[dtype]
        config.architectures = [type(self.model).__name__]
        if self._untied:
            config.tie_word_embeddings = False
        with quiet():
            config.save_pretrained(folder)
        generation = self.folder / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, folder / generation.name)


class Computable:
    """Streamed weights as modules take them to compute: whole, since the adapter's modules stay with `weights`."""

    def __init__(self, weights: Streamed) -> None:
        self.model = self.adapted = skeleton(str(weights.folder))
        self.parts: dict[str, Any] = {}
        self.stored = weights.read
        own = dict(weights.model.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(own[name])

    def part_of(self, _name: str) -> None:
        return None


class InMemory:
    """Weights of a model that is whole in memory."""

    def __init__(self, model: Any) -> None:
        """Fold the adapter of the model, if it has one."""
        self.model = _whole(model)
        self._state = self.model.state_dict()
        shared = ties(self.model)
        self._names = [name for name in self._state if shared.get(name, name) == name]

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self._state[name].detach()

    def save(self, folder: Path, dtype: str, max_shard_size: str) -> None:
        with quiet():
            self.model.to(NAMES[dtype]).save_pretrained(folder, max_shard_size=max_shard_size)


def _whole(model: Any) -> Any:
    if not hasattr(model, "peft_config"):
        return dequantised(model) if codes_of(model) else model
    if codes_of(model.get_base_model()):
        return dequantised(_folded(lambda: fold_pooled(model, over=QuantizedLinear)))
    return _folded(lambda: model.merge_and_unload(safe_merge=True))


def _folded(fold: Callable[[], Any]) -> Any:
    try:
        with quiet():
            return fold()
    except (ValueError, NotImplementedError) as error:  # safe_merge found a number that is none
        fix = "look at the run's loss: it may have diverged; resume from an earlier checkpoint"
        problem = Problem(rule="merge-broken", what="the adapter cannot be merged", why=str(error), fix=fix)
        raise RunError(problem) from error


def _parts(adapted: Any, folder: Path) -> Iterator[_Part]:
    """Yield the outermost modules that an adapter changed; raises NotStreamable for those not folded alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

    config = adapted.active_peft_config
    if config.is_prompt_learning or not hasattr(adapted.base_model, "merge_and_unload"):
        what = "the adapter cannot be merged into its base"
        why = f"it is a {config.peft_type.value}, which adds to the input and not to weights"
        fix = f"use it on its base as it is: {folder} loads in peft"
        raise RecipeError(Problem("not-mergeable", what, why=why, fix=fix))
    if getattr(config, "layer_replication", None):
        raise NotStreamable("the adapter repeats layers")
    outer = ""
    for path, module in adapted.base_model.model.named_modules():
        if outer and path.startswith(outer):
            continue
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        outer = path + "."
        if isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[module.active_adapters[0]]
            part = _Part(path, module, torch.nn.Module(), lambda saved=saved: saved)
        elif isinstance(module, TrainableTokensWrapper):
            part = _layer(path, module, module.token_adapter)
        elif isinstance(module, BaseTunerLayer) and not hasattr(module, "unload_and_optionally_merge_module"):
            part = _layer(path, module, module)
        else:
            raise NotStreamable(f"`{path}` is a {type(module).__name__}, which is not folded by itself")
        inner = [one for one in module.modules() if isinstance(one, BaseTunerLayer) and one is not module]
        if len(inner) > isinstance(module, AuxiliaryTrainingWrapper):
            raise NotStreamable(f"`{path}` carries more than one adapter")
        _require_values(part, folder)
        yield part


def _layer(path: str, module: Any, layer: Any) -> _Part:
    base = layer.get_base_layer()

    def fold() -> Any:
        layer.merge(safe_merge=True)
        layer.merged_adapters.clear()  # the weights it was merged into are taken away again
        return base

    return _Part(path, module, base, fold)


def _require_values(part: _Part, folder: Path) -> None:
    originals = {id(weight) for weight in part.base.parameters()}
    original = getattr(part.module, "original_module", None)
    originals |= {id(weight) for weight in original.parameters()} if original is not None else set()
    for name, weight in part.module.named_parameters():
        if (weight.is_meta or absent(weight)) and id(weight) not in originals:
            raise damaged(str(folder), f"it has no values for {part.path}.{name}")
