"""What fixes the function of a model: sizes, constants, and how it is executed."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from nanochat_jax.hardware import devices
from nanochat_jax.utils.errors import InputError

REMAT_MODES = ("none", "mlp", "block")


@dataclass(frozen=True)
class GPTConfig:
    """Everything that fixes the model's function. Hashable, so it can be a static argument of a jitted function.

    The first six fields are the reference's `model_config`. The rest is neutral by default: `rotary_dtype` is what the
    rotary tables are rounded to (bfloat16 as the reference; float32 as transformers), `window_pattern` is tiled over
    the layers ("S" = a window of a quarter of the context, rounded up to 128; "L" = full; the last layer is always
    full), `compute_dtype` "auto" is bfloat16 on accelerators and float32 on CPU, `attention` "auto" is cuDNN where it
    works and XLA elsewhere, `remat` names what the backward pass recomputes (nothing, every MLP, every block).
    """

    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    rotary_base: float = 10000.0
    rotary_dtype: str = "bfloat16"
    softcap: float = 15.0
    window_pattern: str = "L"
    compute_dtype: str = "auto"
    attention: str = "auto"
    remat: str = "none"

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.n_kv_head > self.n_head or self.n_head % self.n_kv_head:
            raise InputError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        if self.head_dim % 2:
            raise InputError(f"head width n_embd/n_head = {self.head_dim} must be even for rotary embeddings")
        if self.rotary_dtype not in ("float32", "bfloat16"):
            raise InputError(f"rotary_dtype must be float32 or bfloat16, got {self.rotary_dtype!r}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise InputError(f"window_pattern must consist of S and L, got {self.window_pattern!r}")
        if self.compute_dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"compute_dtype must be auto, float32 or bfloat16, got {self.compute_dtype!r}")
        if self.attention not in ("auto", "cudnn", "xla"):
            raise InputError(f"attention must be auto, cudnn or xla, got {self.attention!r}")
        if self.remat not in REMAT_MODES:
            raise InputError(f"remat must be one of {REMAT_MODES}, got {self.remat!r}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def dtype(self) -> Any:
        """dtype of activations and matmuls (parameters are always float32)."""
        if self.compute_dtype == "auto":
            return devices.activation_dtype()
        return jnp.dtype(self.compute_dtype)

    def window(self, layer: int) -> int | None:
        """How many earlier keys a query of this layer sees besides itself; None means all of them."""
        if layer == self.n_layer - 1 or self.window_pattern[layer % len(self.window_pattern)] == "L":
            return None
        return -(-self.sequence_len // (4 * 128)) * 128

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int, sequence_len: int, **overrides) -> "GPTConfig":
        """The one dial: width 64 x depth, heads of width at most 128, as the reference.

        Where the reference's rule gives heads that do not divide the width (most odd depths), the width is rounded up
        to a multiple of 128 instead of failing.
        """
        if depth < 1:
            raise InputError(f"depth must be at least 1, got {depth}")
        width = 64 * depth
        heads = max(1, -(-width // 128))
        if width % heads or (width // heads) % 2:
            width = heads * 128
        shape = dict(n_layer=depth, n_head=heads, n_kv_head=heads, n_embd=width)
        return cls(vocab_size=vocab_size, sequence_len=sequence_len, **{**shape, **overrides})
