"""QA-LoRA: the adapter against plain LoRA, the merge against both parts, calibration and files against formulas."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ftune.adapters.pooled import PooledLinear, add_pooled_lora, fold_pooled
from ftune.blocks import blocks_of
from ftune.errors import RecipeError, RunError
from ftune.models.load import load_model
from ftune.quantized.calibration import quantise_sequentially
from ftune.quantized.codes import GroupCodes
from ftune.quantized.files import fingerprint, read_codes, write_codes
from ftune.quantized.gptq import InputHessian, fit_gptq
from ftune.quantized.linear import QuantizedLinear
from ftune.quantized.minmax import fit_minmax
from ftune.quantized.model import codes_of, dequantised, linear_layers, put_codes, quantise
from ftune.quantized.saved import save_quantized, save_torchao
from ftune.recipe.schema import Model
from ftune.tuning.qalora import QALoRAOptions

IDS = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(3))
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def quantized(bits: int = 4, group_size: int = 16, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a tiny model in few bits; from float64 weights the scales and offsets are float64."""
    model = make_model(**changes).to(dtype)
    quantise(model, list(linear_layers(model)), lambda weight: fit_minmax(weight, bits, group_size))
    return model.eval()


def adapted(model: Any, *, names: list[str] | None = None, **options: Any) -> Any:
    """Return the model with an adapter that says something."""
    chosen = QALoRAOptions(r=4, lora_alpha=8, **options)
    made = add_pooled_lora(model, names or list(codes_of(model)), chosen, over=QuantizedLinear)
    for number, (name, weight) in enumerate(made.named_parameters()):
        if "lora_" in name:
            weight.data = drawn(*weight.shape, seed=number, dtype=model.dtype) / 20
    return made.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def other_groups(model: Any, group_size: int = 16) -> Any:
    """Give the codes of a model groups that are not neighbours."""
    for number, layer in enumerate(module for module in model.modules() if isinstance(module, QuantizedLinear)):
        codes = layer.codes
        order = torch.randperm(codes.in_features, generator=torch.Generator().manual_seed(number))
        index = (torch.arange(codes.in_features) // group_size)[order]
        layer.codes = GroupCodes(codes.packed, codes.scale, codes.offset, codes.bits, codes.in_features, index)
    return model


@pytest.mark.parametrize("index", [False, True], ids=["consecutive", "indexed"])
def test_pooled_adapter_is_plain_lora_whose_columns_repeat(index: bool, tmp_path: Path) -> None:
    made = adapted(other_groups(quantized()) if index else quantized())
    made.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(dequantised(other_groups(quantized()) if index else quantized()), str(tmp_path))
    for module in plain.modules():
        if hasattr(module, "lora_A"):
            assert isinstance(module.lora_A["default"], nn.Linear)
    difference = (logits(made) - logits(plain.eval())).abs().max()
    assert difference <= 1e-5
    assert (logits(made) - logits(quantized())).abs().max() > 0.1
    # Read back, it is the adapter over groups that it was, bit for bit.
    again = adapted(other_groups(quantized()) if index else quantized())
    for weight in again.parameters():
        if weight.requires_grad:
            weight.data.zero_()
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    for (name, weight), (_, other) in zip(made.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_pooled_layer_is_plain_loras_whose_columns_repeat(dtype: torch.dtype, limit: float) -> None:
    """Relative to the length of the answer: sums are made in another order."""
    layer, x = PooledLinear(64, 4, 3).to(dtype), drawn(5, 7, 64, dtype=dtype)
    expected = x @ layer.weight.detach().repeat_interleave(16, 1).T
    assert (layer(x) - expected).norm() <= limit * expected.norm()


def test_groups_of_one_are_pefts_lora() -> None:
    plain = get_peft_model(
        dequantised(quantized(group_size=1)),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
    )
    made = adapted(quantized(group_size=1))
    ours = dict(made.named_parameters())
    for name, weight in plain.named_parameters():
        if "lora_" in name:
            assert weight.shape == ours[name].shape
            weight.data.copy_(ours[name].data)
    assert torch.equal(logits(made), logits(plain.eval()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_made_in_float32(dtype: torch.dtype) -> None:
    """256 activations of 1000 are past the largest float16, and past what bfloat16 counts by thousands."""
    layer = PooledLinear(256, 1, 1)
    layer.weight.data.fill_(1e-3)
    with torch.autocast("cpu", dtype=dtype):
        assert layer(torch.full((1, 256), 1000.0, dtype=dtype)).item() == pytest.approx(256.0, rel=1e-6)


def test_only_sums_are_kept_for_the_gradient() -> None:
    layer, x = PooledLinear(512, 8, 4), drawn(3, 512).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x).sum().backward()
    assert max(kept) == max(3 * 8, 4 * 8)


@BITS
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_is_base_and_adapter(
    bits: int, group_size: int, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Each layer of a model by itself: y = base(x) + s (pooled x) A^T B^T before, merged(x) after."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "initializer_range": 0.05}
    model = quantized(bits, group_size, dtype=dtype, attention_bias=bias, mlp_bias=bias, **shape)
    before = {name: codes.codes() for name, codes in codes_of(model).items()}
    made = adapted(model)
    expected = {}
    for name in before:
        layer = made.get_base_model().get_submodule(name)
        x = drawn(6, layer.in_features, seed=9, dtype=dtype)
        base = layer.get_base_layer()
        dense = base.dequantised(dtype)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        pooled = x.view(6, -1, group_size).sum(dim=-1)
        expected[name] = (x, nn.functional.linear(x, dense.weight, base.bias) + 2.0 * pooled @ down.T @ up.T)
        assert (base.bias is not None) == bias
        assert (layer(x) - expected[name][1]).abs().max() <= tolerance
    merged = fold_pooled(made, over=QuantizedLinear)
    for name, (x, y) in expected.items():
        assert (merged.get_submodule(name)(x) - y).abs().max() <= tolerance, name
        assert torch.equal(merged.get_submodule(name).codes.codes(), before[name])


def test_an_adapter_that_differs_within_groups_is_not_folded(tmp_path: Path) -> None:
    plain = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path)
    made = adapted(quantized(), names=["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"])
    with pytest.raises(RunError, match="differs within"):
        made.load_adapter(str(tmp_path), "default", is_trainable=True)


def test_gptq_goes_through_a_model_on_the_inputs_of_what_is_quantised_already() -> None:
    """Against a plain loop that runs the whole model anew before each layer, in the order in which layers are read."""
    batches = [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:, :23]}]
    made, plain = make_model().eval(), make_model().eval()
    names = list(linear_layers(made))
    quantise_sequentially(made, blocks_of(made), names, batches, bits=3, group_size=16, say=lambda _: None)
    for block in range(2):
        for together in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ):
            layers = [f"model.layers.{block}.{inner}" for inner in together]
            seen = {name: InputHessian(plain.get_submodule(name).in_features) for name in layers}
            hooks = [
                plain.get_submodule(name).register_forward_pre_hook(lambda _, args, one=seen[name]: one.add(args[0]))
                for name in layers
            ]
            with torch.no_grad():
                for batch in batches:
                    plain(**batch)
            for hook in hooks:
                hook.remove()
            for name in layers:
                dense = plain.get_submodule(name)
                put_codes(plain, {name: fit_gptq(dense.weight, 3, 16, hessian=seen[name].mean())})
    for name, codes in codes_of(plain).items():
        found = made.get_submodule(name).codes
        assert torch.equal(found.packed, codes.packed), name
        torch.testing.assert_close(found.offset, codes.offset, rtol=0, atol=1e-6)
    assert len(codes_of(plain)) == 14
    assert not made.training


def test_codes_come_back_from_the_disk_as_they_were(tmp_path: Path) -> None:
    model = other_groups(quantized(3))
    write_codes(tmp_path / "codes.safetensors", codes_of(model))
    found = read_codes(tmp_path / "codes.safetensors")
    assert fingerprint(found) == fingerprint(codes_of(model))
    other = make_model()
    put_codes(other, found)
    assert torch.equal(logits(other.eval()), logits(model))
    with pytest.raises(RecipeError, match="do not belong"):
        put_codes(make_model(hidden_size=64), found)


def test_a_changed_bit_of_the_codes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    write_codes(path, codes_of(quantized()))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="not those that were written"):
        read_codes(path)
    path.write_bytes(content[:-7])
    with pytest.raises(RunError, match="cannot be used"):
        read_codes(path)
    with pytest.raises(RunError, match="cannot be used"):
        read_codes(tmp_path / "missing")


@BITS
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_merged_model_is_a_folder_that_ftune_loads(bits: int, tied: bool, tmp_path: Path) -> None:
    merged = fold_pooled(adapted(quantized(bits, tie_word_embeddings=tied)), over=QuantizedLinear)
    save_quantized(merged, tmp_path, max_shard_size="5GB")
    found = load_model(Model(model_name_or_path=str(tmp_path), dtype="float32"))
    assert torch.equal(logits(found), logits(merged))
    assert fingerprint(codes_of(found)) == fingerprint(codes_of(merged))
    assert found.is_quantized
    (tmp_path / "rest.safetensors").rename(tmp_path / "gone")
    with pytest.raises(RunError):
        load_model(Model(model_name_or_path=str(tmp_path), dtype="float32"))


LOADS = """
import sys
sys.modules["ftune"] = None
import torch
from transformers import AutoModelForCausalLM
kind, ids, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == kind
    torch.save(model(torch.load(ids), use_cache=False).logits.detach(), folder + "/logits")
"""


def fresh_logits(kind: str, folders: list[Path]) -> list[torch.Tensor]:
    """Return what transformers says of each folder in a process that cannot import ftune."""
    ids = folders[0] / "ids"
    torch.save(IDS, ids)
    command = [sys.executable, "-c", LOADS, kind, str(ids), *map(str, folders)]
    subprocess.run(command, check=True, capture_output=True, cwd=folders[0])
    return [torch.load(folder / "logits") for folder in folders]


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="pip install --no-deps torchao")
def test_torchao_loads_a_merged_model_without_ftune(tmp_path: Path) -> None:
    folders, expected = [], []
    for bits in (2, 3, 4, 8):
        merged = fold_pooled(adapted(quantized(bits, attention_bias=True)), over=QuantizedLinear)
        folder = tmp_path / str(bits)
        folder.mkdir()
        save_torchao(merged, folder, max_shard_size="5GB")
        folders.append(folder)
        expected.append(logits(merged))
    for found, wanted in zip(fresh_logits("IntxUnpackedToInt8Tensor", folders), expected, strict=True):
        assert (found - wanted).abs().max() <= 1e-4


def test_transformers_loads_a_dequantised_model_without_ftune(tmp_path: Path) -> None:
    merged = fold_pooled(adapted(quantized(3)), over=QuantizedLinear)
    expected = logits(merged)
    dequantised(merged).save_pretrained(tmp_path)
    assert (fresh_logits("Parameter", [tmp_path])[0] - expected).abs().max() <= 1e-5


def test_torchao_is_refused_groups_it_cannot_store(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not neighbours"):
        save_torchao(other_groups(quantized()), tmp_path, max_shard_size="5GB")


def gptq_checkpoint(folder: Path, bits: int, *, ordered: bool, version: str | None) -> Any:
    """Write a GPTQ checkpoint by the letter of its format, number by number; return the dense model that it is."""
    from safetensors.torch import save_file

    model = make_model(head_dim=16, hidden_size=64, intermediate_size=96)
    tensors = {}
    for name, layer in linear_layers(model).items():
        rows, columns, groups = layer.out_features, layer.in_features, layer.in_features // 32
        noise = torch.Generator().manual_seed(len(name))
        codes = torch.randint(2**bits, (rows, columns), generator=noise)
        zeros = torch.randint(1, 2**bits, (rows, groups), generator=noise)
        scales = (torch.rand(rows, groups, generator=noise) / 2**bits + 0.01).half()
        index = torch.arange(columns) // 32
        if ordered:
            index = index[torch.randperm(columns, generator=noise)]
        layer.weight.data = scales.float()[:, index] * (codes - zeros[:, index])
        stored = zeros if version == "gptq_v2" else zeros - 1
        tensors[f"{name}.qweight"] = torch.tensor([words(column.tolist(), bits) for column in codes]).T.contiguous()
        tensors[f"{name}.qzeros"] = torch.tensor([words(group.tolist(), bits) for group in stored.T])
        tensors[f"{name}.scales"] = scales.T.contiguous()
        tensors[f"{name}.g_idx"] = index.int()
    rest = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in linear_layers(model)}
    folder.mkdir()
    save_file({**rest, **tensors}, folder / "model.safetensors")
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": ordered, "sym": False}
    if version is not None:
        settings["checkpoint_format"] = version
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return model.eval()


def words(numbers: list[int], bits: int) -> list[int]:
    """Return numbers as signed 32-bit words: one long integer, cut into pieces."""
    whole = sum(number << (bits * place) for place, number in enumerate(numbers))
    pieces = [(whole >> (32 * place)) & 0xFFFFFFFF for place in range(len(numbers) * bits // 32)]
    return [piece - (1 << 32) if piece >= 1 << 31 else piece for piece in pieces]


@BITS
@pytest.mark.parametrize("version", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [False, True], ids=["in order", "act order"])
def test_a_gptq_checkpoint_is_read_without_its_package(
    bits: int, version: str | None, ordered: bool, tmp_path: Path
) -> None:
    dense = gptq_checkpoint(tmp_path / "base", bits, ordered=ordered, version=version)
    found = load_model(Model(model_name_or_path=str(tmp_path / "base"), dtype="float32"))
    codes = codes_of(found)
    assert len(codes) == 14
    assert {one.bits for one in codes.values()} == {bits}
    assert all((one.group_index is not None) == ordered for one in codes.values())
    for name, one in codes.items():
        torch.testing.assert_close(one.dequantise(), dense.get_submodule(name).weight.data, rtol=1e-6, atol=1e-6)
    # In float64: what is left is the arithmetic of the merge.
    torch.testing.assert_close(logits(found.double()), logits(dense.double()), rtol=1e-4, atol=1e-4)
    made = adapted(found)
    expected = logits(made)
    torch.testing.assert_close(logits(fold_pooled(made, over=QuantizedLinear)), expected, rtol=1e-9, atol=1e-9)


def test_a_gptq_layer_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    gptq_checkpoint(tmp_path / "base", 4, ordered=False, version=None)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.scales"]
    save_file(tensors, path)
    with pytest.raises(RunError, match=r"`model\.layers\.1\.self_attn\.q_proj` are damaged.*no scales"):
        load_model(Model(model_name_or_path=str(tmp_path / "base")))


def test_gptq_of_other_bits_is_refused(tmp_path: Path) -> None:
    gptq_checkpoint(tmp_path / "base", 4, ordered=False, version=None)
    path = tmp_path / "base" / "config.json"
    path.write_text(path.read_text().replace('"bits": 4', '"bits": 5'))
    with pytest.raises(RecipeError, match="weights of 5 bits"):
        load_model(Model(model_name_or_path=str(tmp_path / "base"), dtype="float32"))
