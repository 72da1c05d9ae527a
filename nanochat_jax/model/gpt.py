"""The GPT: its layers and the one forward pass. Configuration: `config.py`; parameters and initialisation:
`parameters.py`.

Parameters are a plain nested dict and always an argument; the Flax modules below only say how arrays become
activations. They are split once (`_graphdef`), merged inside traced code, and never cross a jit boundary. Training,
evaluation and cached decoding all run this same code: a cache is an argument, not a second model.

Shapes in names: B rows, T new tokens, S cache capacity, C width, H query heads, G key/value heads, D head width,
V vocabulary, L layers. Kernels are Flax-style (in, out): y = x @ kernel.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanochat_jax.model.attention import attention
from nanochat_jax.model.config import REMAT_MODES as REMAT_MODES
from nanochat_jax.model.config import GPTConfig as GPTConfig
from nanochat_jax.model.kv_cache import KVCache, cached_attention
from nanochat_jax.model.linear import project
from nanochat_jax.model.parameters import Params as Params
from nanochat_jax.model.parameters import abstract as abstract
from nanochat_jax.model.parameters import flops_per_token as flops_per_token
from nanochat_jax.model.parameters import init as init
from nanochat_jax.model.parameters import num_params as num_params
from nanochat_jax.model.parameters import shape_of
from nanochat_jax.model.tensor_parallel import UNSHARDED, Parallel, keep_all_but_gathered
from nanochat_jax.utils.errors import InputError

NORM_EPS = float(np.finfo(np.float32).eps)  # 2**-23, also under bf16 activations (reference behaviour)


# ---------------------------------------------------------------------------------------------------------------------
# modules


@jax.custom_vjp
def rms_norm(x: jax.Array) -> jax.Array:
    """x / rms(x) over the last axis, without a gain; statistics in float32, result in x's dtype.

    The backward pass works from the result, which the next product keeps anyway, and one number per row. `jax.grad`
    would save x besides, in all 4 C values per token and layer.
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
    layer) need not be saved: half a unit in the last place of the result's dtype is lost."""
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
        self.config, self.layer = config, layer
        self.c_q = _linear(config, f"h/{layer}/attn/c_q")
        self.c_k = _linear(config, f"h/{layer}/attn/c_k")
        self.c_v = _linear(config, f"h/{layer}/attn/c_v")
        self.c_proj = _linear(config, f"h/{layer}/attn/c_proj")

    def __call__(self, x, rotary, cache: KVCache | None, parallel: Parallel = UNSHARDED):
        B, T, _ = x.shape
        config = self.config
        x = parallel.enter(x)
        q = self.c_q(x).reshape(B, T, -1, config.head_dim)  # -1: this device's heads
        k = self.c_k(x).reshape(B, T, -1, config.head_dim)
        v = self.c_v(x).reshape(B, T, -1, config.head_dim)
        q, k = rms_norm(apply_rotary(q, *rotary)), rms_norm(apply_rotary(k, *rotary))  # rotary first, then the norm
        window = config.window(self.layer)
        k, v = parallel.local_kv_heads(config.n_head, config.n_kv_head, q.shape[2], k, v)
        if cache is None:
            y, kv = attention(q, k, v, window=window, implementation=config.attention), None
        else:
            y, kv = cached_attention(q, k, v, cache, self.layer, window=window)
        return parallel.leave(self.c_proj(y.reshape(B, T, -1))), kv


class MLP(nnx.Module):
    def __init__(self, config: GPTConfig, layer: int):
        self.c_fc = _linear(config, f"h/{layer}/mlp/c_fc")
        self.c_proj = _linear(config, f"h/{layer}/mlp/c_proj")

    def __call__(self, x, parallel: Parallel = UNSHARDED):
        return parallel.leave(self.c_proj(relu_squared(self.c_fc(parallel.enter(x)))))


class Block(nnx.Module):
    def __init__(self, config: GPTConfig, layer: int):
        self.config = config
        self.attn = Attention(config, layer)
        self.mlp = MLP(config, layer)

    def __call__(self, x, rotary, cache: KVCache | None, parallel: Parallel = UNSHARDED):
        y, kv = self.attn(rms_norm(x), rotary, cache, parallel)
        x = x + y
        mlp = _recomputed(self.mlp) if self.config.remat == "mlp" else self.mlp
        return x + mlp(rms_norm(x), parallel), kv


class GPT(nnx.Module):
    """Token ids to final normed hidden states; the unembedding is applied by `forward` or, fused, by the loss."""

    def __init__(self, config: GPTConfig):
        self.config = config
        self.wte = nnx.Embed(*shape_of(config, "wte/embedding"), dtype=config.dtype, rngs=nnx.Rngs(0))
        self.h = nnx.Dict({str(i): Block(config, i) for i in range(config.n_layer)})
        self.lm_head = _linear(config, "lm_head")

    def __call__(self, ids, cache: KVCache | None = None, parallel: Parallel = UNSHARDED):
        config = self.config
        T = ids.shape[1]
        if cache is None:
            cos, sin = rotary_tables(T, config.head_dim, config.rotary_base, config.rotary_dtype)
            rotary = cos[None, :, None, :], sin[None, :, None, :]
        else:
            cos, sin = rotary_tables(cache.capacity, config.head_dim, config.rotary_base, config.rotary_dtype)
            position = cache.position[:, None] + jnp.arange(T)[None]
            rotary = jnp.asarray(cos)[position][:, :, None, :], jnp.asarray(sin)[position][:, :, None, :]
        table = parallel.unsharded(self.wte.embedding[...], "wte/embedding", config.dtype).astype(config.dtype)
        x = rms_norm(parallel.look_up(table, ids))
        keys_values = []
        for layer in range(config.n_layer):
            block = self.h[str(layer)]
            everything = config.remat == "block" and cache is None
            if everything or parallel.fsdp is not None:
                gather = functools.partial(parallel.unsharded, path=f"h/{layer}", dtype=config.dtype)
                block = _recomputed(block, gather, None if everything else keep_all_but_gathered)
            x, kv = block(x, rotary, cache, parallel)
            keys_values.append(kv)
        return rms_norm(x), keys_values


def _linear(config: GPTConfig, path: str) -> nnx.Linear:
    """The product with the kernel at path/kernel."""
    kind = dict(use_bias=False, dtype=config.dtype, param_dtype=jnp.float32, dot_general=_project_for_flax)
    return nnx.Linear(*shape_of(config, f"{path}/kernel"), **kind, rngs=nnx.Rngs(0))


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
# the functional interface


@functools.lru_cache(maxsize=32)
def _graphdef(config: GPTConfig):
    """The modules without their arrays; `nnx.merge` with a parameter tree makes the model."""
    return nnx.split(nnx.eval_shape(lambda: GPT(config)))[0]


def hidden_states(config: GPTConfig, params: Params, ids: jax.Array, parallel: Parallel = UNSHARDED) -> jax.Array:
    """Final normed hidden states (B, T, C) in the compute dtype for ids (B, T); `parallel`: see there."""
    if ids.shape[1] > 10 * config.sequence_len:
        raise InputError(
            f"{ids.shape[1]} tokens exceed the rotary range of 10 x sequence_len = {10 * config.sequence_len}"
        )
    return nnx.merge(_graphdef(config), params)(ids, None, parallel)[0]


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
    hidden, keys_values = nnx.merge(_graphdef(config), params)(ids, cache)
    return hidden, cache.replace_layers(keys_values)
