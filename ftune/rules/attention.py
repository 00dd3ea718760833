"""What each kind of flash attention needs: its package, and how new a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flash:
    """One kind of flash attention."""

    package: str
    """The import name under which transformers looks for its kernels."""
    capability: tuple[int, int]
    """The least compute capability."""
    install: str


FLASH = {
    "flash_attention_2": Flash("flash_attn", (8, 0), "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": Flash(
        "flash_attn_interface",
        (9, 0),
        "run `python setup.py install` in the folder hopper of github.com/Dao-AILab/flash-attention",
    ),
}
"""The kinds by their name in `model.attn_implementation`."""
