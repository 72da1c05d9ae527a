"""The GPT: its layers and the one forward pass. Configuration: `config.py`; parameters and initialisation:
`parameters.py`.

Parameters are a plain nested dict and always an argument; the Flax modules below only say how arrays become
activations. They are split once (`_graphdef`), merged inside traced code, and never cross a jit boundary. Training,
evaluation and cached decoding all run this same code: a cache is an argument, not a second model.

Shapes in names: B rows, T new tokens, S cache capacity, C width, H query heads, G key/value heads, D head width,
V vocabulary, L layers. Kernels are Flax-style (in, out): y = x @ kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nanochat_jax.model import float8, fused, layers
from nanochat_jax.model.attention import attention
from nanochat_jax.model.config import REMAT_MODES as REMAT_MODES
from nanochat_jax.model.config import SMEAR_CHANNELS, VALUE_GATE_CHANNELS
from nanochat_jax.model.config import GPTConfig as GPTConfig
from nanochat_jax.model.joined_qkv import part_qkv
from nanochat_jax.model.kv_cache import KVCache
from nanochat_jax.model.kv_in_place import InPlaceCache
from nanochat_jax.model.layers import apply_rotary as apply_rotary
from nanochat_jax.model.layers import look_up, relu_squared, rms_norm
from nanochat_jax.model.layers import rotary_tables as rotary_tables
from nanochat_jax.model.linear import project, project_each
from nanochat_jax.model.parameters import Params as Params
from nanochat_jax.model.parameters import abstract as abstract
from nanochat_jax.model.parameters import flops_per_token as flops_per_token
from nanochat_jax.model.parameters import init as init
from nanochat_jax.model.parameters import leaves, shape_of
from nanochat_jax.model.parameters import num_params as num_params
from nanochat_jax.model.tensor_parallel import UNSHARDED, Parallel, keep_all_but_gathered
from nanochat_jax.utils.errors import InputError

Cache = KVCache | InPlaceCache

# ---------------------------------------------------------------------------------------------------------------------
# modules


def _project_for_flax(x, kernel, dimension_numbers, precision=None, out_sharding=None):
    return project(x, kernel)  # nnx.Linear only ever contracts x's last axis with the kernel's first


def _float8_for_flax(x, kernel, dimension_numbers, precision=None, out_sharding=None):
    return float8.project(x, kernel)


class Attention(nnx.Module):
    def __init__(self, config: GPTConfig, layer: int):
        self.config, self.layer = config, layer
        self.c_q = _linear(config, f"h/{layer}/attn/c_q")
        self.c_k = _linear(config, f"h/{layer}/attn/c_k")
        self.c_v = _linear(config, f"h/{layer}/attn/c_v")
        self.c_proj = _linear(config, f"h/{layer}/attn/c_proj")
        if config.has_value_embed(layer):
            self.ve_gate = _linear(config, f"h/{layer}/attn/ve_gate")
            self.value_embed = _embedding(config, f"h/{layer}/attn/value_embed")

    @jax.named_scope("attention")
    def __call__(self, x, ids, rotary, cache: Cache | None, parallel: Parallel = UNSHARDED):
        B, T, _ = x.shape
        config = self.config
        x = parallel.enter(x)
        q, k, v = (y.reshape(B, T, -1, config.head_dim) for y in self._products(x))  # -1: this device's heads
        if config.has_value_embed(self.layer):
            # at most 3 times the embedding, 1.5 times at first: the gate is the value embedding's switch, per head
            gate = 3.0 * jax.nn.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))
            v = v + gate[..., None] * look_up(self.value_embed.embedding[...], ids, config.dtype).reshape(v.shape)
        cos, sin = rotary
        if isinstance(cache, InPlaceCache):  # one kernel for heads that lie side by side
            both = layers.rotary_norm(jnp.concatenate([q, k], axis=2), cos, sin, config.qk_scale)
            q, k = jnp.split(both, [q.shape[2]], axis=2)
        else:
            q, k = (_norms(config, cache).rotary_norm(x, cos, sin, config.qk_scale) for x in (q, k))
        window = config.window(self.layer)
        k, v = parallel.local_kv_heads(config.n_head, config.n_kv_head, q.shape[2], k, v)
        if cache is None:
            y, kv = attention(q, k, v, window=window, implementation=config.attention), None
        else:
            y, kv = cache.attend(q, k, v, self.layer, window)
        return parallel.leave(self.c_proj(y.reshape(B, T, -1))), kv

    def _products(self, x):
        """Queries, keys, values of x."""
        linears, config = (self.c_q, self.c_k, self.c_v), self.config
        if config.compute_dtype == "float8":
            return [linear(x) for linear in linears]
        return project_each(x, [linear.kernel[...].astype(config.dtype) for linear in linears])


class MLP(nnx.Module):
    def __init__(self, config: GPTConfig, layer: int):
        self.c_fc = _linear(config, f"h/{layer}/mlp/c_fc")
        self.c_proj = _linear(config, f"h/{layer}/mlp/c_proj")

    @jax.named_scope("mlp")
    def __call__(self, x, parallel: Parallel = UNSHARDED):
        return parallel.leave(self.c_proj(relu_squared(self.c_fc(parallel.enter(x)))))


class Block(nnx.Module):
    def __init__(self, config: GPTConfig, layer: int):
        self.config = config
        self.attn = Attention(config, layer)
        self.mlp = MLP(config, layer)

    def __call__(self, x, x0, factors, ids, rotary, cache: Cache | None, parallel: Parallel = UNSHARDED):
        norms = _norms(self.config, cache)
        x, x0, normed = norms.mixed_with_norm(x, x0, factors)
        y, kv = self.attn(normed, ids, rotary, cache, parallel)
        x, normed = norms.with_norm(x + y)
        mlp = _recomputed(self.mlp) if self.config.remat == "mlp" else self.mlp
        return x + mlp(normed, parallel), x0, kv


class GPT(nnx.Module):
    """Token ids to final normed hidden states; the unembedding is applied by `forward` or, fused, by the loss."""

    # there where the config has the part
    resid_lambdas: nnx.Param
    x0_lambdas: nnx.Param
    smear_lambda: nnx.Param
    backout_lambda: nnx.Param

    def __init__(self, config: GPTConfig):
        self.config = config
        self.wte = _embedding(config, "wte")
        self.h = nnx.Dict({str(i): Block(config, i) for i in range(config.n_layer)})
        self.lm_head = _linear(config, "lm_head")
        if config.smear:
            self.smear_gate = _linear(config, "smear_gate")
        for leaf in leaves(config):
            if leaf.kind.use == "scale":
                setattr(self, leaf.path, nnx.Param(jnp.zeros(leaf.shape)))

    def __call__(self, ids, cache: Cache | None = None, parallel: Parallel = UNSHARDED):
        config = self.config
        # 1. Rotary tables for these positions.
        T = ids.shape[1]
        if cache is None:
            cos, sin = rotary_tables(T, config.head_dim, config.rotary_base, config.rotary_dtype)
            rotary = cos[None, :, None, :], sin[None, :, None, :]
        else:
            cos, sin = rotary_tables(cache.capacity, config.head_dim, config.rotary_base, config.rotary_dtype)
            position = cache.position[:, None] + jnp.arange(T)[None]
            rotary = jnp.asarray(cos)[position][:, :, None, :], jnp.asarray(sin)[position][:, :, None, :]
        # 2. Embeddings, each with something of the one before.
        table = parallel.unsharded(self.wte.embedding[...], "wte/embedding", config.dtype)
        x = rms_norm(parallel.look_up(table, ids, config.dtype))
        if config.smear:
            x = self._smear(x, ids, table, cache, parallel)
        # 3. The layers.
        mixes = config.resid_lambdas or config.x0_lambdas
        x0, middle = x if mixes else None, None
        keys_values = []
        for layer in range(config.n_layer):
            block = self.h[str(layer)]
            everything = config.remat == "block" and cache is None
            if everything or parallel.fsdp is not None:
                gather = functools.partial(parallel.unsharded, path=f"h/{layer}", dtype=config.dtype)
                block = _recomputed(block, gather, None if everything else keep_all_but_gathered)
            factors = self._factors(layer) if mixes else None
            x, x0, kv = block(x, x0, factors, ids, rotary, cache, parallel)
            keys_values.append(kv)
            if layer == config.n_layer // 2:
                middle = x
        # 4. What the middle layer knew already is taken out again.
        if config.backout and middle is x:
            # One or two layers: the norm undoes all of it but the sign. Its gradient would be rounding, of which AdamW
            # makes full steps: the factor wanders past 1 at last, and the loss jumps from 5 to 8 (dev/LOG.md).
            x = jnp.where(self.backout_lambda[0] > 1, -x, x)
        elif config.backout:
            x = (x - self.backout_lambda[0] * middle).astype(config.dtype)
        return rms_norm(x), keys_values

    def _smear(self, x, ids, table, cache: Cache | None, parallel: Parallel):
        """x_t + lambda * gate(x_t) * x_(t-1), from the embeddings as they were (B, T, C); the first has none before it,
        nor has, unless the config says so, the first of a document."""
        config = self.config
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        if cache is not None:
            last = rms_norm(parallel.look_up(table, jnp.maximum(cache.last_ids, 0), config.dtype))
            before = before.at[:, 0].set(jnp.where(cache.last_ids[:, None] >= 0, last, 0))
        gate = self.smear_lambda[0] * jax.nn.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        if config.smear_stops_at is not None:
            gate = jnp.where(ids[..., None] == config.smear_stops_at, 0.0, gate)
        return (x + gate * before).astype(config.dtype)

    def _factors(self, layer: int):
        """What a layer multiplies the residual stream and the embedding by before it adds them, in float32."""
        of_x = self.resid_lambdas[layer] if self.config.resid_lambdas else jnp.ones(())
        return of_x, self.x0_lambdas[layer] if self.config.x0_lambdas else jnp.zeros(())


def _norms(config: GPTConfig, cache: Cache | None):
    """The module with the norms of a block: `fused` has those of `layers` as kernels, for whole sequences."""
    return fused if config.fused and cache is None else layers


def _embedding(config: GPTConfig, path: str) -> nnx.Embed:
    """The table at path/embedding."""
    return nnx.Embed(*shape_of(config, f"{path}/embedding"), dtype=config.dtype, rngs=nnx.Rngs(0))


def _linear(config: GPTConfig, path: str) -> nnx.Linear:
    """The product with the kernel at path/kernel."""
    shape = shape_of(config, f"{path}/kernel")
    in_float8 = config.compute_dtype == "float8" and path.startswith("h/") and float8.fits(shape)
    product = _float8_for_flax if in_float8 else _project_for_flax
    kind = dict(use_bias=False, dtype=config.dtype, param_dtype=jnp.float32, dot_general=product)
    return nnx.Linear(*shape, **kind, rngs=nnx.Rngs(0))


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
    logits = logits[..., : config.vocab_size]
    return config.softcap * jnp.tanh(logits / config.softcap)


def forward(config: GPTConfig, params: Params, ids: jax.Array) -> jax.Array:
    """Softcapped float32 logits (B, T, V) for ids (B, T). Causal: logits at t depend on ids up to t."""
    return unembed(config, params, hidden_states(config, params, ids))


def forward_cached(config: GPTConfig, params: Params, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Any]:
    """Hidden states (B, T, C) of T new tokens per row, appended to the cache at each row's own position.

    params may be those of `join_qkv`. Returns the cache with the new keys and values written but `position` unchanged:
    the caller advances it by the number of *real* tokens of each row (`cache.advance`), so padded prefill needs no
    second code path. Positions beyond the capacity are the caller's error: XLA clamps them silently.
    """
    hidden, keys_values = nnx.merge(_graphdef(config), part_qkv(config, params))(ids, cache)
    return hidden, cache.append(ids, keys_values)
