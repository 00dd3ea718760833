"""Write the checkpoints beside this file, with the hqq package and a transformers that still knows it.

ftune needs neither, and hqq changes what PEFT imports where it is installed; so the files are kept, and this is how
they were made (CPU; hqq 0.2.8.post1, transformers 4.55.4, torch 2.13.0):

    DISABLE_CUDA=1 pip install hqq==0.2.8.post1 transformers==4.55.4
    python tests/hqq_checkpoints/make.py

`layers.safetensors`: single layers as HQQLinear saves them, each with `dequantised`, what hqq makes of it in float32.
`transformers/`: a model quantised and saved by transformers: 3 bits, words viewed as floats, two shards, tied, biases.
`package/`: one quantised and saved by hqq alone: 4 bits; its config.json does not say so.
`logits.safetensors`: what the two say to the tokens 3 to 14.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from hqq.models.hf.base import AutoHQQHFModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, HqqConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
ODD = {
    "axis-0": {"nbits": 4, "group_size": 16, "axis": 0},
    "1-bit": {"nbits": 1, "group_size": 16, "axis": 1},
    "1.58-bit": {"nbits": 1.58, "group_size": 16, "axis": 1},
    "5-bit": {"nbits": 5, "group_size": 16, "axis": 1},
    "long-groups": {"nbits": 4, "group_size": 64, "axis": 1},
}
"""Settings of layers that cannot be trained upon."""


def layer(dtype: torch.dtype, **settings: Any) -> dict[str, torch.Tensor]:
    """Return a layer of 32 inputs and 12 outputs as it is saved, and what it stands for in float32."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 12, bias=False)
    made = HQQLinear(linear, BaseQuantizeConfig(**settings), compute_dtype=dtype, device="cpu")
    numbers = {part: made.meta[part].float() for part in ("scale", "zero")}
    meta = {**made.meta, **numbers, "compute_dtype": torch.float32}
    return {**made.state_dict(), "dequantised": Quantizer.dequantize(made.W_q, meta)}


def layers() -> dict[str, torch.Tensor]:
    found = {name: layer(torch.bfloat16, **settings) for name, settings in ODD.items()}
    dtypes = ("float32", "float16", "bfloat16")
    for bits, dtype, floats in itertools.product((2, 3, 4, 8), dtypes, (False, True)):
        settings = {"nbits": bits, "group_size": 16, "axis": 1, "view_as_float": floats}
        found[f"{bits}-{dtype}-{floats}"] = layer(getattr(torch, dtype), **settings)
    return {f"{name}.{part}": tensor.detach() for name, held in found.items() for part, tensor in held.items()}


def dense(folder: Path, *, tied: bool) -> Path:
    """Write a random Llama."""
    torch.manual_seed(0)
    shape = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    more = {"attention_bias": True, "initializer_range": 0.2, "tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, **more))
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    return folder


def said(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None]).logits


def main() -> None:
    for name in ("transformers", "package"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    save_file(layers(), HERE / "layers.safetensors")

    plain = dense(HERE / "plain", tied=True)
    config = HqqConfig(nbits=3, group_size=16, axis=1, view_as_float=True)
    model = AutoModelForCausalLM.from_pretrained(plain, torch_dtype=torch.float32, quantization_config=config)
    logits = {"transformers": said(model)}
    model.save_pretrained(HERE / "transformers", max_shard_size="40KB")

    model = AutoModelForCausalLM.from_pretrained(dense(plain, tied=False), torch_dtype=torch.float32)
    config = BaseQuantizeConfig(nbits=4, group_size=16, axis=1)
    AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float32, device="cpu")
    logits["package"] = said(model)
    AutoHQQHFModel.save_to_safetensors(model, str(HERE / "package"))
    save_file(logits, HERE / "logits.safetensors")
    shutil.rmtree(plain)


if __name__ == "__main__":
    main()
