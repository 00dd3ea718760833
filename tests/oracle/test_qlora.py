"""QLoRA against the formula of its codes, against LoRA on the weights that they stand for, and against PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from training_runs import no_rows

from ftune.adapters import bits
from ftune.adapters.lora import add_lora
from ftune.adapters.options import QLoRAOptions
from ftune.models.generate import generate_answers
from ftune.models.load import load_model, load_tokenizer
from ftune.models.quiet import quiet
from ftune.recipe.schema import Model

BLOCK = 64
IDS = torch.arange(3, 67).reshape(2, 32)

WIDTHS: list[dict[str, Any]] = [
    {},
    {"bnb_4bit_use_double_quant": False},
    {"bnb_4bit_quant_type": "fp4"},
    {"bnb_4bit_quant_storage": "float32"},
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model whose matrices have several blocks."""
    folder = tmp_path_factory.mktemp("wide")
    make_model(hidden_size=64, intermediate_size=192, initializer_range=0.05).save_pretrained(folder)
    return folder


def held(folder: Path, options: QLoRAOptions) -> Any:
    model = Model(model_name_or_path=str(folder), dtype="float32")
    return load_model(model, quantization=options.quantization())


def adapted(model: Any, options: QLoRAOptions) -> Any:
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(1)
        return add_lora(model, options, batches=no_rows)


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return float(loss.detach()), {name: w.grad.clone() for name, w in model.named_parameters() if w.requires_grad}


def with_b(model: Any) -> Any:
    """Give B values, so that gradients reach A too."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.02
    return model


def normal_float_values() -> torch.Tensor:
    """Return NF4's 16 values: quantiles of N(0, 1), evenly spaced on each side of an exact zero (QLoRA, section 3)."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return values / values.max()


def stored_bits(module: torch.nn.Module) -> float:
    """Return the bits in which a 4-bit layer's weights are stored, scales and all, for each of them."""
    weight: Any = module.weight
    state = weight.quant_state
    tensors = [weight.data, state.absmax]
    if state.nested:
        tensors.append(state.state2.absmax)
    return 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors) / bits.count(weight)


def test_codes_are_those_of_the_formula(wide: Path) -> None:
    """Each weight has the code of the value nearest to weight / largest of its block; two codes in a byte."""
    options = QLoRAOptions(bnb_4bit_use_double_quant=False)
    plain = load_model(Model(model_name_or_path=str(wide), dtype="float32")).model.layers[0].mlp.up_proj.weight
    layer = held(wide, options).model.layers[0].mlp.up_proj
    values = normal_float_values()
    blocks = plain.detach().reshape(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    codes = ((blocks / scales).double()[..., None] - values).abs().argmin(dim=-1)
    packed = (codes.reshape(-1, 2)[:, 0] * 16 + codes.reshape(-1, 2)[:, 1]).to(torch.uint8)
    assert bool((layer.weight.data.flatten() == packed).all())
    assert bool((layer.weight.quant_state.absmax == scales.flatten()).all())
    restored = (values.float()[codes] * scales).reshape(plain.shape)
    torch.testing.assert_close(bits.dequantised_weight(layer), restored, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("double", "expected"), [(True, 4.127), (False, 4.5)])
def test_bits_of_a_weight_as_they_are_stored(double: bool, expected: float) -> None:
    """4 for the code, 32 / 64 for the scale of its block; or 8 / 64 and 32 / (64 * 256)."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(2048, 2048, bias=False, compress_statistics=double, quant_type="nf4").to("cpu")
    if layer.weight.quant_state is None:
        layer.weight = layer.weight._quantize(torch.device("cpu"))
    assert stored_bits(layer) == pytest.approx(expected, abs=1e-3)
    assert bits.count(layer.weight) == 2048 * 2048


@pytest.mark.parametrize("settings", WIDTHS, ids=str)
def test_a_step_is_that_of_lora_on_the_dequantised_base(settings: dict[str, Any], wide: Path) -> None:
    options = QLoRAOptions(r=4, **settings)
    quantised = held(wide, options)
    plain = bits.dequantised(copy.deepcopy(quantised))
    assert not any(bits.is_quantised(module) for module in plain.modules())
    weights, losses = [], []
    for model in (with_b(adapted(quantised, options)), with_b(adapted(plain, options))):
        optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3, eps=1e-3)
        for _ in range(2):
            loss, _ = loss_and_gradients(model)
            optimizer.step()
            losses.append(loss)
        weights.append({name: w.detach() for name, w in model.named_parameters() if w.requires_grad})
    assert losses[:2] == pytest.approx(losses[2:], abs=1e-6)
    assert losses[1] < losses[0]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [*WIDTHS, {"load_in_8bit": True}], ids=str)
def test_step_0_is_the_quantised_base(settings: dict[str, Any], wide: Path) -> None:
    options = QLoRAOptions(**settings)
    base = held(wide, options).eval()
    with torch.no_grad(), quiet():
        before = base(input_ids=IDS).logits
        after = adapted(base, options).eval()(input_ids=IDS).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("settings", [{}, {"load_in_8bit": True}], ids=str)
@pytest.mark.parametrize("between", ["evaluation", "generation"])
def test_gradients_survive_what_is_done_without_them(between: str, settings: dict[str, Any], tiny_model: Path) -> None:
    """bitsandbytes repacks 4-bit weights at the first forward in evaluation mode, for a kernel without a gradient."""
    options = QLoRAOptions(**settings)
    with quiet():
        model = with_b(adapted(held(tiny_model, options), options))
        _, before = loss_and_gradients(model)
        if between == "evaluation":
            with torch.no_grad():
                model.eval()(input_ids=IDS)
        else:
            tokenizer = load_tokenizer(Model(model_name_or_path=str(tiny_model)))
            generate_answers(model, tokenizer, ["what?"], max_new_tokens=3)
        _, after = loss_and_gradients(model)
    for name, gradient in before.items():
        assert torch.equal(after[name], gradient), name
    assert all(bool(gradient.any()) for gradient in before.values())


def test_checkpointing_changes_no_gradient(wide: Path) -> None:
    """Not reentrant, it needs no inputs that require a gradient."""
    options = QLoRAOptions()
    model = with_b(adapted(held(wide, options), options))
    _, plain = loss_and_gradients(model)
    with quiet():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, again = loss_and_gradients(model)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=1e-7)


class TestLoftQ:
    @pytest.mark.parametrize("alpha", [4, 32])
    def test_starts_with_the_closest_matrix_of_its_rank(self, alpha: int, wide: Path) -> None:
        """By Eckart and Young what is left has the singular values beyond the first r, whatever the scale."""
        options = QLoRAOptions(r=4, lora_alpha=alpha, init_lora_weights="loftq")
        plain = load_model(Model(model_name_or_path=str(wide), dtype="float32"))
        model = adapted(held(wide, options), options)
        for layer, own in ((layer, "mlp.up_proj") for layer in (0, 1)):
            found = model.get_base_model().model.layers[layer].get_submodule(own)
            wanted = plain.model.layers[layer].get_submodule(own).weight.detach()
            error = wanted - bits.dequantised_weight(found.get_base_layer())
            left = torch.linalg.svdvals(error.double())[4:].square().sum().sqrt()
            rest = error - found.get_delta_weight("default").detach()
            assert float(rest.double().norm()) == pytest.approx(float(left), rel=1e-5)
            assert left < 0.95 * error.norm()

    def test_is_pefts_where_the_scale_is_one(self, wide: Path) -> None:
        from peft.utils.loftq_utils import _low_rank_decomposition

        options = QLoRAOptions(r=4, lora_alpha=4, init_lora_weights="loftq")
        plain = load_model(Model(model_name_or_path=str(wide), dtype="float32"))
        found = adapted(held(wide, options), options).get_base_model().model.layers[0].mlp.up_proj
        error = plain.model.layers[0].mlp.up_proj.weight.detach() - bits.dequantised_weight(found.get_base_layer())
        theirs = _low_rank_decomposition(error, reduced_rank=4)
        torch.testing.assert_close(found.lora_B["default"].weight.detach(), theirs["L"])
        torch.testing.assert_close(found.lora_A["default"].weight.detach(), theirs["R"])
