"""What fixes the function of a model: sizes, constants, parts, and how it is executed."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import jax.numpy as jnp

from nanochat_jax.hardware import devices
from nanochat_jax.utils.errors import InputError

REMAT_MODES = ("none", "mlp", "block")
SPECIAL_TOKENS = 9  # bos and eight more end every vocabulary of this project, bos first

# Channels that the gates look at: the first ones of the normed embedding and of a block's normed input.
SMEAR_CHANNELS, VALUE_GATE_CHANNELS = 24, 12

Recipe = Literal["v1", "modern"]
RECIPES = ("v1", "modern")  # the reference of October 2025, and that of July 2026

# The parts of the modern recipe: each a field of GPTConfig, neutral by default.
MODERN: dict[str, Any] = dict(
    window_pattern="SSSL",
    rotary_base=100_000.0,
    rotary_dtype="float32",
    qk_scale=1.2,
    resid_lambdas=True,
    x0_lambdas=True,
    value_embeds=True,
    smear=True,
    backout=True,
    vocab_multiple=64,
    initialisation="modern",
)


@dataclass(frozen=True)
class GPTConfig:
    """Everything that fixes the model's function. Hashable, so it can be a static argument of a jitted function.

    The first six fields are the reference's `model_config`. The parts that follow are neutral by default, which is the
    reference of October 2025; `GPTConfig.modern` switches them all on.

    Arguments:
        rotary_base, rotary_dtype: of the rotary tables; what they are rounded to before the activations' dtype
            (bfloat16 as the reference did at first; float32 as it does now, and transformers).
        softcap: logits are softcap * tanh(logits / softcap), in float32.
        window_pattern: tiled over the layers: "S" sees a window of a quarter of the context, rounded up to 128, "L"
            all of it; the last layer is always "L".
        qk_scale: factor on queries and keys after their norm.
        resid_lambdas, x0_lambdas: learned factors, before each layer, on the residual stream and on the embedding x0
            that is added to it again.
        value_embeds: on every other layer, the last one included, an embedding of each token is added to its values,
            through a gate per head that looks at VALUE_GATE_CHANNELS channels.
        smear: the embedding of the token before is added to each, through a gate that looks at SMEAR_CHANNELS
            channels. It stops at the token `bos_id` (None: where this project's tokenizers have bos, SPECIAL_TOKENS
            before the end), unless `smear_across_documents` (reference behaviour).
        backout: a learned multiple of the residual stream after the middle layer is subtracted at the end.
        vocab_multiple: parameters have rows for a vocabulary rounded up to it; logits do not.
        initialisation: which reference's distributions fresh parameters are drawn from.
        compute_dtype: "auto" is bfloat16 on accelerators and float32 on CPU; "float8" is bfloat16 with the layers'
        products in float8 (see `float8.py`).
        attention: "auto" is cuDNN where it works and XLA elsewhere.
        remat: what the backward pass recomputes (nothing, every MLP, every block).
        fused: norms of whole sequences are the kernels of `fused.py`, for NVIDIA GPUs.
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
    qk_scale: float = 1.0
    resid_lambdas: bool = False
    x0_lambdas: bool = False
    value_embeds: bool = False
    smear: bool = False
    smear_across_documents: bool = False
    bos_id: int | None = None
    backout: bool = False
    vocab_multiple: int = 1
    initialisation: Recipe = "v1"
    compute_dtype: str = "auto"
    attention: str = "auto"
    remat: str = "none"
    fused: bool = False

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.n_kv_head > self.n_head or self.n_head % self.n_kv_head:
            raise InputError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        if self.head_dim % 2:
            raise InputError(f"head width n_embd/n_head = {self.head_dim} must be even for rotary embeddings")
        if self.rotary_dtype not in ("float32", "bfloat16"):
            raise InputError(f"rotary_dtype must be float32 or bfloat16, got {self.rotary_dtype!r}")
        if self.initialisation not in RECIPES:
            raise InputError(f"initialisation must be one of {RECIPES}, got {self.initialisation!r}")
        if self.vocab_multiple < 1:
            raise InputError(f"vocab_multiple must be at least 1, got {self.vocab_multiple}")
        for part, needed in (("smear", SMEAR_CHANNELS), ("value_embeds", VALUE_GATE_CHANNELS)):
            if getattr(self, part) and self.n_embd < needed:
                raise InputError(
                    f"{part} needs a width n_embd of at least {needed}, the channels that its gate looks at; this one "
                    f"is {self.n_embd}: take a larger depth, or {part}=off"
                )
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise InputError(f"window_pattern must consist of S and L, got {self.window_pattern!r}")
        if self.compute_dtype not in ("auto", "float32", "bfloat16", "float8"):
            raise InputError(f"compute_dtype must be auto, float32, bfloat16 or float8, got {self.compute_dtype!r}")
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
        return jnp.dtype("bfloat16" if self.compute_dtype == "float8" else self.compute_dtype)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embeddings and columns of lm_head; those beyond `vocab_size` are never used."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def smear_stops_at(self) -> int | None:
        """The token that nothing is smeared into: the beginning of a document. None: smear crosses documents."""
        if self.smear_across_documents:
            return None
        return self.vocab_size - SPECIAL_TOKENS if self.bos_id is None else self.bos_id

    def window(self, layer: int) -> int | None:
        """How many earlier keys a query of this layer sees besides itself; None means all of them.

        In a pattern with windows the long ones are the context, so that beyond it they slide (reference behaviour).
        """
        if "S" not in self.window_pattern:
            return None
        if layer == self.n_layer - 1 or self.window_pattern[layer % len(self.window_pattern)] == "L":
            return self.sequence_len
        return -(-self.sequence_len // (4 * 128)) * 128

    @property
    def windows(self) -> tuple[int | None, ...]:
        """`window` of every layer."""
        return tuple(self.window(layer) for layer in range(self.n_layer))

    def has_value_embed(self, layer: int) -> bool:
        """Every other layer has one, counted from the last."""
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that are not neutral."""
        neutral = {field.name: field.default for field in fields(self)}
        return tuple(name for name in MODERN if getattr(self, name) != neutral[name])

    @classmethod
    def modern(
        cls,
        sequence_len: int,
        vocab_size: int,
        n_layer: int,
        n_head: int,
        n_kv_head: int,
        n_embd: int,
        window_pattern: str = "SSSL",
        **overrides,
    ) -> "GPTConfig":
        """The model of the reference's recipe of July 2026; overrides switch parts off again."""
        parts = {**MODERN, "window_pattern": window_pattern, **overrides}
        return cls(sequence_len, vocab_size, n_layer, n_head, n_kv_head, n_embd, **parts)

    @classmethod
    def from_depth(
        cls, depth: int, vocab_size: int, sequence_len: int, recipe: Recipe = "v1", **overrides
    ) -> "GPTConfig":
        """The one dial: width 64 x depth, heads of width at most 128, as the reference.

        Where that width is not a whole number of heads (most odd depths), it is rounded up to a multiple of 128. The
        modern recipe always rounds up, so its heads are 128 wide.
        """
        if depth < 1:
            raise InputError(f"depth must be at least 1, got {depth}")
        if recipe not in RECIPES:
            raise InputError(f"recipe must be one of {RECIPES}, got {recipe!r}")
        width = 64 * depth
        heads = max(1, -(-width // 128))
        if recipe == "modern" or width % heads or (width // heads) % 2:
            width = heads * 128
        shape = dict(n_layer=depth, n_head=heads, n_kv_head=heads, n_embd=width)
        parts = MODERN if recipe == "modern" else {}
        return cls(vocab_size=vocab_size, sequence_len=sequence_len, **{**parts, **shape, **overrides})
