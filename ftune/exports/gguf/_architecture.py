"""What llama.cpp has to know of a model's shape, and which models it knows by which name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, TensorNameMap, get_tensor_name_map

from ftune.errors import Problem, RecipeError
from ftune.models.quiet import quiet

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
_ROPE_TYPES = ("default", "linear", "llama3")
ROPE_FACTORS = "rope_freqs.weight"


def config_of(source: Any) -> Any:
    """Return the configuration of a source as transformers understands it."""
    from transformers import AutoConfig

    with quiet():
        return AutoConfig.from_pretrained(source.folder, local_files_only=True)


def check(source: Any) -> None:
    """Raise RecipeError for a model that would be another one in llama.cpp."""
    config = config_of(source)
    known = ", ".join(ARCHITECTURES)
    if config.model_type not in ARCHITECTURES:
        raise _refused(f"`{source.name}` is a {config.model_type}", f"ftune writes GGUF for {known}")
    if config.hidden_act != "silu":
        raise _refused(f"`{source.name}` computes with {config.hidden_act}", "llama.cpp has silu in this architecture")
    kind = rope_of(config)["rope_type"]
    if kind not in _ROPE_TYPES:
        raise _refused(f"`{source.name}` stretches positions by `{kind}`", f"ftune writes {', '.join(_ROPE_TYPES)}")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        source.say(f"the model sees the last {window} tokens; llama.cpp will let it see all: keep to {window}")


def _refused(what: str, why: str) -> RecipeError:
    fix = "export safetensors, and convert them with llama.cpp's convert_hf_to_gguf.py if it knows the model"
    return RecipeError(Problem("gguf-architecture", f"{what}: it cannot be written as GGUF", why=why, fix=fix))


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary parameters: `rope_type`, `rope_theta`, and those of the type."""
    found = dict(config.rope_parameters or {})
    return {"rope_type": "default", "rope_theta": 10000.0, **found}


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def describe(writer: GGUFWriter, config: Any) -> None:
    """Write the model's shape."""
    rope = rope_of(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """Return by what each rotary frequency is divided (head size / 2), where no rule of llama.cpp's gives it."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = head_size(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (plain / stretched).numpy()


def names_of(config: Any) -> TensorNameMap:
    """Return the map from names in transformers to those in GGUF."""
    return get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)


def architecture_of(config: Any) -> str:
    return str(MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])


def rearranged(value: torch.Tensor, name: str, config: Any, *, back: bool = False) -> torch.Tensor:
    """Return a weight as llama.cpp wants it, or `back` as transformers does.

    Rotary pairs of a head lie (i, i + size / 2) in transformers and (2i, 2i + 1) in llama.cpp's Llama; its Qwen is
    as in transformers.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or ARCHITECTURES[config.model_type] is not MODEL_ARCH.LLAMA:
        return value
    half = value.shape[0] // heads // 2
    pairs = (heads, half, 2) if back else (heads, 2, half)
    return value.reshape(*pairs, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
