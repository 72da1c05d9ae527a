"""Bits per byte: cross-entropy that does not depend on the tokenizer.

bpb = sum of nats over all counted targets / (ln 2 x sum of their UTF-8 bytes). Special tokens (0 bytes) and ignored
targets count on neither side. It is a ratio of sums, so it does not depend on the batch size.
"""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax import sharding
from nanochat_jax.gpt import GPTConfig, Params
from nanochat_jax.loss import token_nll


@functools.lru_cache(maxsize=8)
def nats_and_bytes_fn(config: GPTConfig, mesh: Mesh | None = None):
    """A jitted (params, inputs, targets, token_bytes) -> (nats float32, bytes int32) for (B, T) batches.

    With a mesh, rows are dealt to its devices (B must divide by their number) and both sums are global.
    """

    def local(params, inputs, targets, token_bytes):
        nll = token_nll(config, params, inputs, targets)
        size = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
        return jnp.sum(jnp.where(size > 0, nll, 0.0)), jnp.sum(size)

    if mesh is None:
        return jax.jit(local)

    def summed(*args):
        return jax.tree.map(lambda x: jax.lax.psum(x, sharding.DATA_AXIS), local(*args))

    whole, rows = sharding.replicated_spec(), sharding.batch_spec(2)
    return jax.jit(
        jax.shard_map(summed, mesh=mesh, in_specs=(whole, rows, rows, whole), out_specs=(whole, whole), check_vma=False)
    )


def bits_per_byte(
    config: GPTConfig,
    params: Params,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    token_bytes: np.ndarray,
    mesh: Mesh | None = None,
) -> float:
    """Bits per byte over (inputs, targets) batches of shape (B, T); token_bytes (V,) int32 from the tokenizer.

    Returns infinity if no target has any bytes.
    """
    count = nats_and_bytes_fn(config, mesh)
    sizes = jnp.asarray(token_bytes, jnp.int32)
    nats, n_bytes = 0.0, 0
    for inputs, targets in batches:
        batch_nats, batch_bytes = count(params, inputs, targets, sizes)
        nats, n_bytes = nats + float(batch_nats), n_bytes + int(batch_bytes)
    return nats / (math.log(2) * n_bytes) if n_bytes else math.inf
