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

from nanochat_jax.model.gpt import GPTConfig, Params
from nanochat_jax.model.loss import token_nll
from nanochat_jax.parallel import sharding


@functools.lru_cache(maxsize=8)
def loss_sums_fn(config: GPTConfig, mesh: Mesh | None = None):
    """A jitted (params, inputs, targets, token_bytes) -> four sums over a (B, T) batch: nats of targets that have
    bytes, their bytes, nats of all targets, their number.

    With a mesh, rows are sharded over its devices (B must divide by their number) and the sums are global.
    """

    def local(params, inputs, targets, token_bytes):
        nll = token_nll(config, params, inputs, targets)
        size = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
        return jnp.sum(jnp.where(size > 0, nll, 0.0)), jnp.sum(size), jnp.sum(nll), jnp.sum(targets >= 0)

    if mesh is None:
        return jax.jit(local)

    def summed(*args):
        return jax.tree.map(lambda x: jax.lax.psum(x, sharding.AXES), local(*args))

    full, rows = sharding.replicated_spec(), sharding.batch_spec(2)
    return jax.jit(
        jax.shard_map(summed, mesh=mesh, in_specs=(full, rows, rows, full), out_specs=(full,) * 4, check_vma=False)
    )


def held_out_loss(
    config: GPTConfig,
    params: Params,
    batches: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    token_bytes: np.ndarray,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """{"val_loss": mean nats per target, "val_bpb": bits per byte} over (inputs, targets, weights) batches (B, T).

    Targets of weight 0 do not count. token_bytes (V,) int32 from the tokenizer. Infinite where nothing counts.
    """
    count = loss_sums_fn(config, mesh)
    sizes = jnp.asarray(token_bytes, jnp.int32)
    byte_nats, n_bytes, nats, n_targets = 0.0, 0, 0.0, 0
    for inputs, targets, weights in batches:
        sums = count(params, inputs, np.where(weights > 0, targets, -1), sizes)
        byte_nats, n_bytes = byte_nats + float(sums[0]), n_bytes + int(sums[1])
        nats, n_targets = nats + float(sums[2]), n_targets + int(sums[3])
    return {
        "val_loss": nats / n_targets if n_targets else math.inf,
        "val_bpb": byte_nats / (math.log(2) * n_bytes) if n_bytes else math.inf,
    }
