"""One device's part in the forward pass when parameters are sharded over `fsdp` or `tensor` (see `sharding.py`).

The model calls these hooks around its layers; with the default, `UNSHARDED`, none of them does anything. They run
inside `jax.shard_map` without replication tracking, so each defines its own gradient.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax.model.layers import look_up
from nanochat_jax.model.parameters import path_name


@dataclass(frozen=True)
class Parallel:
    """How this device takes part: tensor, fsdp: the names of the mesh axes, None where nothing is sharded.

    shards, dimensions: with fsdp, this device's shard of every parameter, and the dimension along which the shards are
    gathered (None: this one is not sharded over fsdp); both are trees like the parameters. The parameters that the
    model itself is given are then stand-ins of full shape, whose values nothing reads: they are there to be
    differentiated, since the gradient of a full matrix is wanted, not of a shard (that would mean a reduction in every
    micro-step).
    """

    tensor: str | None = None
    fsdp: str | None = None
    shards: Any = None
    dimensions: Any = None

    def enter(self, x: jax.Array) -> jax.Array:
        """Before column-parallel kernels: every device computes its own columns, so gradients of x are summed."""
        return x if self.tensor is None else _enter(x, self.tensor)

    def leave(self, x: jax.Array) -> jax.Array:
        """After row-parallel kernels: the sum of all devices' contributions."""
        return x if self.tensor is None else _leave(x, self.tensor)

    def offset(self, size: int):
        """Where this device's `size` entries of a dimension sharded over `tensor` begin."""
        return 0 if self.tensor is None else jax.lax.axis_index(self.tensor) * size

    def unsharded(self, stand_ins: Any, path: str, dtype) -> Any:
        """The parameters at or below `path`: gathered over `fsdp` in the dtype they are used in, if it shards them.

        Embeddings travel in `dtype` too, and are float32 again where they arrive (see `layers.look_up`)."""
        if self.fsdp is None:
            return stand_ins
        shards, dimensions = self.shards, self.dimensions
        for key in path.split("/"):
            shards, dimensions = shards[key], dimensions[key]

        def gather(keys, stand_in, shard, dimension):
            if dimension is None:
                return stand_in
            full: Any = _gather(stand_in, shard.astype(dtype), self.fsdp, dimension)
            is_table = f"{path}/{path_name(keys)}".rstrip("/").endswith("/embedding")
            return full.astype(stand_in.dtype) if is_table else full

        return jax.tree_util.tree_map_with_path(gather, stand_ins, shards, dimensions)

    def look_up(self, table: jax.Array, ids: jax.Array, dtype) -> jax.Array:
        """Rows of a table (V or V / tensor, C) for ids (B, T), in `dtype`."""
        if self.tensor is None:
            return look_up(table, ids, dtype)
        local = ids - self.offset(table.shape[0])
        mine = (local >= 0) & (local < table.shape[0])
        rows = look_up(table, jnp.where(mine, local, 0), dtype)
        return self.leave(jnp.where(mine[..., None], rows, 0))

    def local_kv_heads(
        self, n_head: int, n_kv_head: int, local_heads: int, *arrays: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Keys and values (B, T, heads, D) for this device's query heads.

        Where every device computes all key/value heads because their number does not divide, each query head gets a
        copy of its own.
        """
        if self.tensor is None or arrays[0].shape[2] * n_head == local_heads * n_kv_head:
            return arrays
        heads = self.offset(local_heads) + jnp.arange(local_heads)
        return tuple(jnp.take(a, heads // (n_head // n_kv_head), axis=2) for a in arrays)


UNSHARDED = Parallel()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _enter(x, axis):
    return x


_enter.defvjp(lambda x, axis: (x, None), lambda axis, _, d: (jax.lax.psum(d, axis),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _leave(x, axis):
    return jax.lax.psum(x, axis)


_leave.defvjp(lambda x, axis: (jax.lax.psum(x, axis), None), lambda axis, _, d: (d,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gather(stand_in, shard, name, dimension):
    return jax.lax.all_gather(shard, name, axis=dimension, tiled=True)


def _gather_fwd(stand_in, shard, name, dimension):
    return _gather(stand_in, shard, name, dimension), (jnp.zeros((), stand_in.dtype), shard)


def _gather_bwd(name, dimension, residuals, d):
    like, shard = residuals
    return d.astype(like.dtype), jnp.zeros_like(shard)


_gather.defvjp(_gather_fwd, _gather_bwd)


def keep_all_but_gathered(primitive, *_, call_jaxpr=None, **__) -> bool:
    """A `jax.checkpoint` policy: gathered parameters are gathered again in the backward pass, the rest is saved."""
    inner = call_jaxpr.eqns if call_jaxpr is not None else ()  # `_gather` comes as one call, with its body
    return not any(equation.primitive.name == "all_gather" for equation in inner)
