"""The GPT: configuration, parameters, initialisation and the one forward pass.

Parameters are a plain nested dict and always an argument; the Flax modules below only say how arrays become
activations. They are split once (`_graphdef`), merged inside traced code, and never cross a jit boundary. Training,
evaluation and cached decoding all run this same code: a cache is an argument, not a second model.

Shapes in names: B rows, T new tokens, S cache capacity, C width, H query heads, G key/value heads, D head width,
V vocabulary, L layers. Kernels are Flax-style (in, out): y = x @ kernel.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanochat_jax.hardware import devices
from nanochat_jax.model.attention import attention
from nanochat_jax.model.kv_cache import KVCache, cached_attention
from nanochat_jax.model.linear import project
from nanochat_jax.model.tensor_parallel import WHOLE, Parallel, keep_all_but_gathered
from nanochat_jax.utils.errors import InputError

Params = dict[str, Any]

NORM_EPS = float(np.finfo(np.float32).eps)  # 2**-23, also under bf16 activations (reference behaviour)
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


# ---------------------------------------------------------------------------------------------------------------------
# modules


@jax.custom_vjp
def rms_norm(x: jax.Array) -> jax.Array:
    """x / rms(x) over the last axis, without a gain; statistics in float32, result in x's dtype.

    The backward pass works from the result, which the next product keeps anyway, and one number per row. `jax.grad`
    would keep x besides, in all 4 C values per token and layer.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPS)).astype(x.dtype)


def _rms_norm_fwd(x):
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPS)
    # the barrier: XLA would rather compute the result again from x in the backward pass, and so keep both
    y = jax.lax.optimization_barrier((x32 * scale).astype(x.dtype))
    return y, (y, scale)


def _rms_norm_bwd(residuals, d_y):
    y, scale = residuals
    y32, d32 = y.astype(jnp.float32), d_y.astype(jnp.float32)
    return ((scale * (d32 - y32 * jnp.mean(y32 * d32, axis=-1, keepdims=True))).astype(y.dtype),)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


@jax.custom_vjp
def relu_squared(x: jax.Array) -> jax.Array:
    """max(x, 0)^2. Its gradient 2 max(x, 0) is taken from the root of the result, so that x (4 C values per token and
    layer) need not be kept: half a unit in the last place of the result's dtype is lost."""
    return jnp.square(jax.nn.relu(x))


def _relu_squared_fwd(x):
    y = relu_squared(x)
    return y, y


def _relu_squared_bwd(y, d_y):
    return ((2.0 * jnp.sqrt(y.astype(jnp.float32)) * d_y.astype(jnp.float32)).astype(y.dtype),)


relu_squared.defvjp(_relu_squared_fwd, _relu_squared_bwd)


@functools.lru_cache(maxsize=32)
def rotary_tables(length: int, head_dim: int, base: float, dtype: str = "bfloat16") -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of shape (length, head_dim / 2), float32 holding values rounded to `dtype` (reference: bfloat16).

    Angles are the reference's float32 ones; power, cosine and sine are computed in float64. NumPy's float32 versions
    differ in the last bit between processors with AVX-512 and without, and one such bit flips a bfloat16 rounding.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = np.float32(1.0) / np.power(np.float64(np.float32(base)), exponent.astype(np.float64)).astype(np.float32)
    angle = (np.arange(length, dtype=np.float32)[:, None] * inv_freq[None, :]).astype(np.float64)

    def rounded(table: np.ndarray) -> np.ndarray:
        return table.astype(np.float32).astype(jnp.dtype(dtype)).astype(np.float32)

    return rounded(np.cos(angle)), rounded(np.sin(angle))


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates (B, T, heads, D) by minus the angle, first half of D paired with the second.

    cos, sin: (B or 1, T, 1, D/2).
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    return jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)


def _project_for_flax(x, kernel, dimension_numbers, precision=None, out_sharding=None):
    return project(x, kernel)  # nnx.Linear only ever contracts x's last axis with the kernel's first


class Attention(nnx.Module):
    def __init__(self, config: GPTConfig, layer: int):
        C, D = config.n_embd, config.head_dim
        self.config, self.layer = config, layer
        self.c_q = _linear(config, C, config.n_head * D)
        self.c_k = _linear(config, C, config.n_kv_head * D)
        self.c_v = _linear(config, C, config.n_kv_head * D)
        self.c_proj = _linear(config, C, C)

    def __call__(self, x, rotary, cache: KVCache | None, parallel: Parallel = WHOLE):
        B, T, _ = x.shape
        config = self.config
        x = parallel.enter(x)
        q = self.c_q(x).reshape(B, T, -1, config.head_dim)  # -1: this device's heads
        k = self.c_k(x).reshape(B, T, -1, config.head_dim)
        v = self.c_v(x).reshape(B, T, -1, config.head_dim)
        q, k = rms_norm(apply_rotary(q, *rotary)), rms_norm(apply_rotary(k, *rotary))  # rotary first, then the norm
        window = config.window(self.layer)
        k, v = parallel.my_kv_heads(config.n_head, config.n_kv_head, q.shape[2], k, v)
        if cache is None:
            y, kv = attention(q, k, v, window=window, implementation=config.attention), None
        else:
            y, kv = cached_attention(q, k, v, cache, self.layer, window=window)
        return parallel.leave(self.c_proj(y.reshape(B, T, -1))), kv


class MLP(nnx.Module):
    def __init__(self, config: GPTConfig):
        self.c_fc = _linear(config, config.n_embd, 4 * config.n_embd)
        self.c_proj = _linear(config, 4 * config.n_embd, config.n_embd)

    def __call__(self, x, parallel: Parallel = WHOLE):
        return parallel.leave(self.c_proj(relu_squared(self.c_fc(parallel.enter(x)))))


class Block(nnx.Module):
    def __init__(self, config: GPTConfig, layer: int):
        self.config = config
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def __call__(self, x, rotary, cache: KVCache | None, parallel: Parallel = WHOLE):
        y, kv = self.attn(rms_norm(x), rotary, cache, parallel)
        x = x + y
        mlp = _recomputed(self.mlp) if self.config.remat == "mlp" else self.mlp
        return x + mlp(rms_norm(x), parallel), kv


class GPT(nnx.Module):
    """Token ids to final normed hidden states; the unembedding is applied by `forward` or, fused, by the loss."""

    def __init__(self, config: GPTConfig):
        self.config = config
        self.wte = nnx.Embed(config.vocab_size, config.n_embd, dtype=config.dtype, rngs=nnx.Rngs(0))
        self.h = nnx.Dict({str(i): Block(config, i) for i in range(config.n_layer)})
        self.lm_head = _linear(config, config.n_embd, config.vocab_size)

    def __call__(self, ids, cache: KVCache | None = None, parallel: Parallel = WHOLE):
        config = self.config
        T = ids.shape[1]
        if cache is None:
            cos, sin = rotary_tables(T, config.head_dim, config.rotary_base, config.rotary_dtype)
            rotary = cos[None, :, None, :], sin[None, :, None, :]
        else:
            cos, sin = rotary_tables(cache.capacity, config.head_dim, config.rotary_base, config.rotary_dtype)
            position = cache.position[:, None] + jnp.arange(T)[None]
            rotary = jnp.asarray(cos)[position][:, :, None, :], jnp.asarray(sin)[position][:, :, None, :]
        table = parallel.whole(self.wte.embedding[...], ("wte", "embedding"), config.dtype).astype(config.dtype)
        x = rms_norm(parallel.look_up(table, ids))
        keys_values = []
        for layer in range(config.n_layer):
            block = self.h[str(layer)]
            everything = config.remat == "block" and cache is None
            if everything or parallel.fsdp is not None:
                gather = functools.partial(parallel.whole, path=("h", str(layer)), dtype=config.dtype)
                block = _recomputed(block, gather, None if everything else keep_all_but_gathered)
            x, kv = block(x, rotary, cache, parallel)
            keys_values.append(kv)
        return rms_norm(x), keys_values


def _linear(config: GPTConfig, n_in: int, n_out: int) -> nnx.Linear:
    kind = dict(use_bias=False, dtype=config.dtype, param_dtype=jnp.float32, dot_general=_project_for_flax)
    return nnx.Linear(n_in, n_out, **kind, rngs=nnx.Rngs(0))


def _recomputed(module, gather=lambda params: params, policy=None):
    """The module as a function (arrays..., parallel) that keeps only its inputs (and what `policy` says) for the
    backward pass and computes the rest again there. `gather` is applied to its parameters."""
    graphdef, state = nnx.split(module)

    def call(*args):
        *arrays, parallel = args
        run = jax.checkpoint(lambda state, *x: nnx.merge(graphdef, gather(state))(*x, parallel), policy=policy)
        return run(nnx.to_pure_dict(state), *arrays)

    return call


# ---------------------------------------------------------------------------------------------------------------------
# the functional face


@functools.lru_cache(maxsize=32)
def _split(config: GPTConfig):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: GPT(config)))
    return graphdef, nnx.to_pure_dict(state)


def abstract(config: GPTConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves, without allocating anything."""
    return _split(config)[1]


def init(config: GPTConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters as the reference draws them.

    Embedding N(0, 1); linear kernels N(0, s^2) with s = min(1, sqrt(out / in)) / sqrt(in) (arXiv:2310.17813); the
    unembedding and both output projections of every block zero, so the first loss is exactly ln V.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract(config))
    out: list[Any] = [None] * len(leaves)
    drawn: dict[tuple[int, ...], list[int]] = {}
    for i, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("lm_head") or "c_proj" in name:
            out[i] = jnp.zeros(leaf.shape, leaf.dtype)
        elif name.startswith("wte"):
            out[i] = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        else:
            drawn.setdefault(leaf.shape, []).append(i)
    for shape, indices in drawn.items():  # one random program per shape: a d20 init compiles in 1 s instead of 5
        fan_in, fan_out = shape
        std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.array(indices))
        stacked = jax.vmap(lambda k, shape=shape: jax.random.normal(k, shape, jnp.float32))(keys) * std
        for row, i in enumerate(indices):
            out[i] = stacked[row]
    return jax.tree_util.tree_unflatten(treedef, out)


def hidden_states(config: GPTConfig, params: Params, ids: jax.Array, parallel: Parallel = WHOLE) -> jax.Array:
    """Final normed hidden states (B, T, C) in the compute dtype for ids (B, T); `parallel`: see there."""
    if ids.shape[1] > 10 * config.sequence_len:
        raise InputError(
            f"{ids.shape[1]} tokens exceed the rotary range of 10 x sequence_len = {10 * config.sequence_len}"
        )
    return nnx.merge(_split(config)[0], params)(ids, None, parallel)[0]


def unembed(config: GPTConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Softcapped float32 logits (..., V) of hidden states (..., C)."""
    kernel = params["lm_head"]["kernel"].astype(hidden.dtype)
    if kernel.dtype == jnp.float32:
        logits = project(hidden, kernel)
    else:
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return config.softcap * jnp.tanh(logits / config.softcap)


def forward(config: GPTConfig, params: Params, ids: jax.Array) -> jax.Array:
    """Softcapped float32 logits (B, T, V) for ids (B, T). Causal: logits at t depend on ids up to t."""
    return unembed(config, params, hidden_states(config, params, ids))


def forward_cached(config: GPTConfig, params: Params, ids: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Hidden states (B, T, C) of T new tokens per row, appended to the cache at each row's own position.

    Returns the cache with the new keys and values written but `position` unchanged: the caller advances it by the
    number of *real* tokens of each row (`cache.advance`), so padded prefill needs no second code path. Positions beyond
    the capacity are the caller's error: XLA clamps them silently.
    """
    hidden, keys_values = nnx.merge(_split(config)[0], params)(ids, cache)
    return hidden, cache.replace_layers(keys_values)


def num_params(config: GPTConfig) -> int:
    """All parameters, both embeddings included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)))


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs per token: 6 (N - V C) + 12 L H D T, attention counted full (reference formula)."""
    embedding = config.vocab_size * config.n_embd
    attention_flops = 12 * config.n_layer * config.n_embd * config.sequence_len
    return 6 * (num_params(config) - embedding) + attention_flops
