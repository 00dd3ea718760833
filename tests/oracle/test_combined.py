"""LoRA beside trained weights, each moved by its own rule inside backward: against two optimizers of torch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import make_model
from torch.multiprocessing.reductions import StorageWeakRef
from training_runs import no_rows
from transformers.optimization import Adafactor

from ftune import plugin
from ftune.adapters.beside import adapter_weights, fold
from ftune.errors import RecipeError

TUNING = plugin.tuning("lora_and_full")
RATES = {"lomo": 0.05, "adalomo": 2e-3}
ADAPTER_RATE, DECAY, STEPS = 3e-3, 0.1, 20


def adapted(model: Any = None, **options: Any) -> Any:
    """Return a model with an adapter that says something."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = TUNING.apply(model or make_model(), TUNING.Options(**{"r": 4, **options}), batches=no_rows)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05, generator=noise)
    return found


def halves(model: Any) -> tuple[list[Any], list[Any]]:
    """Return a model's own weights and the adapter's, told apart by PEFT's names."""
    named = list(model.named_parameters())
    return [w for name, w in named if "lora_" not in name], [w for name, w in named if "lora_" in name]


def groups_of(model: Any, decay: float) -> list[dict[str, Any]]:
    own, added = halves(model)
    return [
        {"params": own, "weight_decay": decay, "adapter": False},
        {"params": added, "weight_decay": decay, "adapter": True},
    ]


def batches(count: int = STEPS) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    return [torch.randint(0, 260, (4, 12), generator=noise) for _ in range(count)]


def built(name: str, model: Any, *, norm: float = 0.0, decay: float = DECAY, **options: Any) -> Any:
    found = plugin.optimizer(name)
    setting = plugin.Setting(model=model, seed=3, max_grad_norm=norm)
    options = found.Options(adapter_learning_rate=ADAPTER_RATE, **options)
    return found.build(groups_of(model, decay), learning_rate=RATES[name], options=options, setting=setting)


def theirs_of(name: str, own: list[Any], decay: float) -> torch.optim.Optimizer:
    if name == "lomo":
        return torch.optim.SGD(own, lr=RATES[name])
    settings = {"scale_parameter": True, "relative_step": False, "warmup_init": False, "beta1": None}
    return Adafactor(own, lr=RATES[name], weight_decay=decay, clip_threshold=1.0, decay_rate=-0.8, **settings)


def difference(one: Any, other: Any) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("norm", [0.0, 0.3])
@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_each_half_moves_by_its_own_optimizer(name: str, norm: float) -> None:
    """Side by side on kept gradients, both rates falling by one schedule, the norm taken over both."""
    ours, theirs = adapted(), adapted()
    optimizer = built(name, ours, norm=norm)
    own, added = halves(theirs)
    others = [theirs_of(name, own, DECAY), torch.optim.AdamW(added, lr=ADAPTER_RATE, weight_decay=DECAY)]
    for step, ids in enumerate(batches()):
        factor = 1 - step / STEPS
        for group in optimizer.param_groups:
            group["lr"] = (ADAPTER_RATE if group["adapter"] else RATES[name]) * factor
        optimizer.backward(ours(input_ids=ids, labels=ids).loss)
        optimizer.step()
        theirs.zero_grad()
        theirs(input_ids=ids, labels=ids).loss.backward()
        found = torch.nn.utils.clip_grad_norm_(theirs.parameters(), norm or math.inf)
        assert float(optimizer.grad_norm) == pytest.approx(float(found), rel=1e-5)
        if norm:
            assert found > norm, "every step is clipped"
        with torch.no_grad():
            for weight in own if name == "lomo" else ():
                weight.mul_(1 - RATES[name] * factor * DECAY)  # torch's SGD knows no decoupled decay
        for other, rate in zip(others, (RATES[name], ADAPTER_RATE), strict=True):
            other.param_groups[0]["lr"] = rate * factor
            other.step()
    assert difference(ours, theirs) <= 1e-6
    start = adapted()
    for now, then in zip(halves(ours), halves(start), strict=True):
        assert all((a != b).any() for a, b in zip(now, then, strict=True)), "both moved"


def test_the_adapter_starts_at_its_own_rate_and_has_the_only_state() -> None:
    model = adapted()
    optimizer = built("lomo", model)
    assert [group["lr"] for group in optimizer.param_groups] == [RATES["lomo"], ADAPTER_RATE]
    for ids in batches(2):
        optimizer.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
    own, added = halves(model)
    assert all(not optimizer.state[weight] for weight in own)
    assert all({"exp_avg", "exp_avg_sq"} <= optimizer.state[weight].keys() for weight in added)
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert sum(value.nbytes for value in held) == 8 * sum(weight.numel() for weight in added)


def test_without_an_adapter_nothing_is_different() -> None:
    model = make_model()
    found = plugin.optimizer("lomo")
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0, "adapter": False}]
    optimizer = found.build(groups, learning_rate=0.1, options=found.Options(), setting=plugin.Setting())
    assert type(optimizer.rule).__name__ == "SGDRule"


FUSED = [name for name in plugin.names(plugin.OPTIMIZERS) if plugin.optimizer(name).gradients is plugin.Gradients.FUSED]


class GradientsAlive:
    """The most bytes of weights' gradients that are alive at once, from when each one reaches its weight."""

    def __init__(self, model: Any) -> None:
        self.most, self._seen = 0, list[tuple[StorageWeakRef, int]]()
        self._hooks = [weight.register_hook(self._add) for weight in model.parameters()]

    def _add(self, gradient: torch.Tensor) -> None:
        self._seen = [(ref, size) for ref, size in self._seen if not ref.expired()]
        storage = gradient.untyped_storage()
        self._seen.append((StorageWeakRef(storage), storage.nbytes()))
        self.most = max(self.most, sum(size for _, size in self._seen))


@pytest.mark.parametrize("how", ["one backward", "two passes", "four at once", "added up"])
@pytest.mark.parametrize(("name", "beside"), [*((name, False) for name in FUSED), ("lomo", True), ("adalomo", True)])
def test_gradients_alive_are_at_most_two_of_the_largest(name: str, beside: bool, how: str) -> None:
    model = make_model(num_hidden_layers=6)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0, "adapter": False}]
    if beside:
        model = adapted(model)
        groups = groups_of(model, 0.0)
    found = plugin.optimizer(name)
    options = {"rank": 8} if "rank" in found.Options.model_fields else {}
    options |= {"four at once": {"accumulate": "forward"}, "added up": {"accumulate": "buffer"}}.get(how, {})
    setting = plugin.Setting(model=model, max_grad_norm=0.3 if how == "two passes" else 0.0)
    optimizer: Any = found.build(groups, learning_rate=1e-3, options=found.Options(**options), setting=setting)
    alive = GradientsAlive(model)
    count = 4 if "accumulate" in options else 1
    for _ in range(2):
        for place, ids in enumerate(batches(count)):
            optimizer.backward(model(input_ids=ids, labels=ids).loss / count, last=place == count - 1)
        optimizer.step()
    largest = max(weight.nbytes for weight in model.parameters())
    assert 0 < alive.most <= 2 * largest
    optimizer.remove()
    ids = batches(1)[0]
    kept = GradientsAlive(model)
    model(input_ids=ids, labels=ids).loss.backward()
    every = sum(weight.nbytes for weight in model.parameters())
    assert kept.most == every > 6 * largest, "kept gradients are seen as such"


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 7},
    "DoRA": {"use_dora": True},
    "some layers": {"target_modules": ["q_proj", "down_proj"]},
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "with dropout": {"lora_dropout": 0.2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_folded_model_says_what_the_unfolded_one_does(variant: str) -> None:
    model = adapted(**VARIANTS[variant])
    optimizer = built("lomo", model, decay=0.0)
    for ids in batches(3):
        optimizer.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
    ids = batches(1)[0]
    plain = copy.deepcopy(model)
    before = model.eval()(input_ids=ids).logits
    names = set(make_model().state_dict())
    folded = TUNING.finished(model)
    assert (folded(input_ids=ids).logits - before).abs().max() <= 1e-5 * before.abs().max()
    assert set(folded.state_dict()) == names
    assert type(folded) is type(make_model())
    with torch.no_grad():
        for weight in adapter_weights(plain):
            weight.zero_()
    if variant != "DoRA":
        assert (plain.eval()(input_ids=ids).logits - before).abs().max() > 1e-2, "the adapter counts"


def test_a_tied_model_stays_tied() -> None:
    model = adapted(make_model(tie_word_embeddings=True))
    ids = batches(1)[0]
    before = model.eval()(input_ids=ids).logits
    folded = TUNING.finished(model)
    assert folded.lm_head.weight is folded.model.embed_tokens.weight
    assert (folded(input_ids=ids).logits - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.filterwarnings("ignore:.*tied layer is part of the adapter.*:UserWarning")
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_shared_weight_is_refused(layer: str) -> None:
    with pytest.raises(RecipeError, match="could not be folded in") as caught:
        adapted(make_model(tie_word_embeddings=True), target_modules=["q_proj", layer])
    (problem,) = caught.value.problems
    assert ("lm_head" if layer == "embed_tokens" else "model.embed_tokens") in problem.why
    assert layer in problem.fix


@pytest.mark.parametrize("dora", [False, True])
def test_sixteen_bits_are_added_in_float32_and_rounded_once(dora: bool) -> None:
    model = adapted(make_model().bfloat16(), use_dora=dora)
    assert {weight.dtype for weight in adapter_weights(model)} == {torch.float32}
    layer = model.model.layers[0].self_attn.q_proj
    weight, low, high = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = (weight.double() + 32 / 4 * high.double() @ low.double()).detach()
    if dora:  # Liu et al., 2024, equation 5
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()
        exact *= (magnitude / exact.norm(dim=1))[:, None]
    folded = fold(model).model.layers[0].self_attn.q_proj.weight
    assert folded.dtype == torch.bfloat16
    # Half of a rounding step, and what float32 sums may add to it.
    assert ((folded.double() - exact).abs() <= exact.abs() * 2**-8 * 1.0001 + 1e-7).all()


def test_adapter_weights_are_all_that_peft_added() -> None:
    model = adapted(use_dora=True)
    assert {id(weight) for weight in adapter_weights(model)} == {id(weight) for weight in halves(model)[1]}
    assert all(weight.requires_grad for weight in model.parameters())
    assert adapter_weights(make_model()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_pair_has_the_bits_of_one_that_was_not_stopped(dtype: torch.dtype) -> None:
    def moved(model: Any, optimizer: Any, rows: list[torch.Tensor]) -> None:
        for ids in rows:
            optimizer.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()

    def make() -> Any:
        return adapted(make_model().to(dtype))

    whole = make()
    moved(whole, built("adalomo", whole, norm=0.5), batches())
    first = make()
    optimizer = built("adalomo", first, norm=0.5)
    moved(first, optimizer, batches()[:10])
    saved = copy.deepcopy(optimizer.state_dict())
    second = make()
    second.load_state_dict(first.state_dict())
    optimizer = built("adalomo", second, norm=0.5)
    optimizer.load_state_dict(saved)
    moved(second, optimizer, batches()[10:])
    assert difference(whole, second) == 0.0
