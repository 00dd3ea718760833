"""HQQ checkpoints that hqq and transformers 4 wrote (see hqq_checkpoints/make.py), against what hqq makes of them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftune.adapters.pooled import add_pooled_lora, fold_pooled
from ftune.errors import RecipeError, RunError
from ftune.models.load import load_model
from ftune.quantized.hqq_files import take_hqq
from ftune.quantized.linear import QuantizedLinear
from ftune.quantized.model import codes_of
from ftune.recipe.schema import Model
from ftune.tuning.qalora import QALoRAOptions

CHECKPOINTS = Path(__file__).parents[1] / "hqq_checkpoints"
MODELS = pytest.mark.parametrize("model", ["transformers", "package"])
BITS = {"transformers": 3, "package": 4}


def read(folder: Path, dtype: str = "float32") -> Any:
    return load_model(Model(model_name_or_path=str(folder), dtype=dtype))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shutil.copytree(CHECKPOINTS / "package", tmp_path / "base")


def layer(name: str) -> dict[str, torch.Tensor]:
    """Return a layer as it was saved, called `layer`, and `dequantised`."""
    tensors = load_file(CHECKPOINTS / "layers.safetensors")
    held = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    return {"dequantised" if part == "dequantised" else f"layer.{part}": tensor for part, tensor in held.items()}


@pytest.mark.parametrize("floats", [False, True], ids=["words", "floats"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layer_is_what_hqq_makes_of_it(bits: int, dtype: str, floats: bool) -> None:
    tensors = layer(f"{bits}-{dtype}-{floats}")
    assert tensors["layer.W_q"].is_floating_point() == floats
    expected = tensors.pop("dequantised")
    layers, rest = take_hqq(tensors)
    found = layers["layer"]
    assert not rest
    assert (found.bits, found.shape, found.group_size) == (bits, (12, 32), 16)
    # Both are rounded to float32: (Q - zero) scale at one place, and scale Q + offset at another.
    zero, scale = (tensors[f"layer.{part}"].double().view(12, 2, 1).expand(12, 2, 16) for part in ("zero", "scale"))
    size = (scale * (found.codes().double().view(12, 2, 16) + zero.abs())).view(12, 32)
    assert ((found.dequantise() - expected).abs() <= 2**-23 * size).all()
    # What was stored in 16 bits is exact in float32.
    exact = (scale * (found.codes().double().view(12, 2, 16) - zero)).view(12, 32)
    if dtype != "float32":
        assert torch.equal(found.dequantise(torch.float64), exact)


@MODELS
def test_a_model_says_what_it_says_in_hqq(model: str) -> None:
    found = read(CHECKPOINTS / model)
    codes = codes_of(found)
    assert len(codes) == 14
    assert {(one.bits, one.group_size) for one in codes.values()} == {(BITS[model], 16)}
    expected = load_file(CHECKPOINTS / "logits.safetensors")[model]
    torch.testing.assert_close(logits(found), expected, rtol=1e-5, atol=2e-5)


@MODELS
def test_an_adapter_merges_into_it_without_a_code_changing(model: str) -> None:
    found = read(CHECKPOINTS / model).double()
    before = {name: (codes.codes(), codes.scale.clone()) for name, codes in codes_of(found).items()}
    plain = logits(found)
    made = add_pooled_lora(found, list(before), QALoRAOptions(r=4, lora_alpha=8), over=QuantizedLinear).eval()
    for number, (name, weight) in enumerate(made.named_parameters()):
        if "lora_" in name:
            noise = torch.Generator().manual_seed(number)
            weight.data = torch.randn(weight.shape, generator=noise, dtype=torch.float64) / 20
    expected = logits(made)
    assert (expected - plain).abs().max() > 0.1
    merged = fold_pooled(made, over=QuantizedLinear)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-9, atol=1e-9)
    for name, codes in codes_of(merged).items():
        assert torch.equal(codes.codes(), before[name][0])
        assert torch.equal(codes.scale, before[name][1])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("axis-0", r"axis 0.*share the zero of one input.*axis=1"),
        ("1-bit", "weights of 1 bits.*2, 3, 4, 8"),
        ("1.58-bit", "weights of 1.58 bits"),
        ("5-bit", "weights of 5 bits"),
        ("long-groups", "groups of 64 that run on.*8, 16, 32"),
    ],
)
def test_layers_that_no_adapter_merges_into_are_refused(name: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as error:
        take_hqq(layer(name))
    assert error.value.problems[0].rule == "hqq-format"


def test_quantised_zeros_are_refused() -> None:
    tensors = layer("4-bfloat16-False")
    tensors["layer.quant_zero"] = torch.tensor(1, dtype=torch.uint8)
    with pytest.raises(RecipeError, match="quantised themselves"):
        take_hqq(tensors)


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"layer.{part}"] = change(tensors[f"layer.{part}"])

    return apply


def without(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"layer.{part}"]

    return apply


NEEDED = ("scale", "zero", "shape", "packing", "nbits", "group_size", "axis")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        *[(without(part), f"it has no {part}") for part in NEEDED],
        (changed("W_q", lambda t: t[:-1]), "W_q is uint8.*need 12 rows of uint8"),
        (changed("W_q", lambda t: t.to(torch.int64)), "W_q is int64"),
        (changed("W_q", lambda t: t.half()), "W_q is float16"),
        (changed("scale", lambda t: t[:-1]), "scale is bfloat16.*24 groups"),
        (changed("zero", lambda t: t.int()), "zero is int32"),
        (changed("scale", lambda t: t * 0), "a scale of it is 0"),
        (changed("zero", lambda t: t * torch.inf), "a zero of it is"),
        (changed("packing", lambda t: t[:-1]), "packed as 4bit_u, where"),
        (changed("packing", lambda t: t.half()), "packed as float16"),
        (changed("nbits", lambda t: torch.tensor([4, 4])), "nbits is int64"),
        (changed("nbits", lambda t: torch.tensor(8)), "packed as 4bit_u8, where"),
        (changed("nbits", lambda t: torch.tensor(torch.nan)), "weights of nan bits"),
        (changed("shape", lambda t: t[:1]), "shape is"),
        (changed("shape", lambda t: t.float() / 0), "shape is float32"),
        (changed("shape", lambda t: -t), "groups of 16"),
        (changed("group_size", lambda t: t * 0), "groups of 0"),
    ],
)
def test_a_damaged_layer_is_refused(damage: Callable[[dict[str, torch.Tensor]], None], said: str) -> None:
    tensors = layer("4-bfloat16-False")
    damage(tensors)
    with pytest.raises((RunError, RecipeError), match=said):
        take_hqq(tensors)


def test_nothing_of_a_file_makes_a_traceback() -> None:
    """Each part in the shape, dtype and number of each other."""
    whole = layer("3-float32-True")
    parts = [key for key in whole if key.startswith("layer.")]
    refused = sum(is_refused({**whole, one: whole[other]}) for one, other in itertools.permutations(parts, 2))
    assert refused > 100


def is_refused(tensors: dict[str, torch.Tensor]) -> bool:
    try:
        take_hqq(tensors)
    except (RunError, RecipeError):
        return True
    return False


@MODELS
def test_damaged_files_are_refused(model: str, tmp_path: Path) -> None:
    folder = shutil.copytree(CHECKPOINTS / model, tmp_path / "base")
    path = max(folder.glob("*.safetensors"))
    whole = path.read_bytes()
    for length in (0, 4, 1000, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(RunError) as error:
            read(folder)
        assert error.value.problems[0].rule in ("weights-damaged", "weights-do-not-fit")
    path.unlink()
    with pytest.raises((RunError, RecipeError)):
        read(folder)


def test_a_model_with_a_layer_missing_or_too_many_is_refused(base: Path) -> None:
    path = base / "model.safetensors"
    tensors, name = load_file(path), "model.layers.1.mlp.up_proj"
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith(name)}, path)
    with pytest.raises(RunError, match=rf"missing: {name}.weight"):
        read(base)
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(name)}
    more = {key.replace("layers.1", "layers.7"): tensor.clone() for key, tensor in own.items()}
    save_file({**tensors, **more}, path)
    with pytest.raises(RecipeError, match=r"it has no layer `model\.layers\.7\.mlp\.up_proj`"):
        read(base)
    save_file({**tensors, f"{name}.zero_scale": tensors[f"{name}.zero"].clone()}, path)
    with pytest.raises(RunError, match=rf"not part of the model: {name}.zero_scale"):
        read(base)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_pickle_of_the_package_is_refused_with_how_to_write_it_anew(base: Path, trusted: bool) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "qmodel.pt")
    (base / "model.safetensors").unlink()
    with pytest.raises((RunError, RecipeError), match=r"qmodel.pt.*HQQ.from_quantized.*HQQ.save_to_safetensors"):
        load_model(Model(model_name_or_path=str(base), trust_remote_code=trusted))


def test_a_model_of_another_quantisation_is_left_to_transformers(base: Path) -> None:
    """What config.json says counts before the names of tensors do."""
    from ftune.quantized.kinds import kind_of_codes

    assert kind_of_codes(base, None) == "hqq"
    assert kind_of_codes(base, {"quant_method": "awq"}) is None
    (base / "model.safetensors").write_bytes(b"\xff" * 40)
    assert kind_of_codes(base, None) is None
