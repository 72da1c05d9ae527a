"""What one device adds to the forward pass when the parameters are cut over `fsdp` or `tensor` (see `sharding.py`).

The model calls these hooks around its layers; with the default, `WHOLE`, none of them does anything. They run inside
`jax.shard_map` without replication tracking, so each says itself what its gradient is.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Parallel:
    """tensor, fsdp: the names of the mesh axes, None where nothing is cut.

    parts, axes: with fsdp, this device's part of every parameter, and the axis along which the parts are put together;
    both are trees like the parameters. The parameters that the model itself is given are then stand-ins of whole shape,
    which nothing reads: they are there to be differentiated, since the gradient of a whole matrix is wanted, not of a
    part (that would mean a reduction in every micro-step).
    """

    tensor: str | None = None
    fsdp: str | None = None
    parts: Any = None
    axes: Any = None

    def enter(self, x: jax.Array) -> jax.Array:
        """Before column-parallel kernels: every device goes on with its columns, so gradients of x are summed."""
        return x if self.tensor is None else _enter(x, self.tensor)

    def leave(self, x: jax.Array) -> jax.Array:
        """After row-parallel kernels: the sum of all devices' contributions."""
        return x if self.tensor is None else _leave(x, self.tensor)

    def offset(self, size: int):
        """Where this device's `size` entries of an axis cut over `tensor` begin."""
        return 0 if self.tensor is None else jax.lax.axis_index(self.tensor) * size

    def whole(self, stand_ins: Any, path: tuple[str, ...], dtype) -> Any:
        """The parameters under `path`: gathered over `fsdp` in the dtype they are used in; untouched without it."""
        if self.fsdp is None:
            return stand_ins
        parts, axes = self.parts, self.axes
        for key in path:
            parts, axes = parts[key], axes[key]
        return jax.tree.map(lambda s, p, a: _gather(s, p.astype(dtype), self.fsdp, a), stand_ins, parts, axes)

    def look_up(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """Rows of a table (V or V / tensor, C) for ids (B, T)."""
        if self.tensor is None:
            return jnp.take(table, ids, axis=0)
        local = ids - self.offset(table.shape[0])
        mine = (local >= 0) & (local < table.shape[0])
        rows = jnp.take(table, jnp.where(mine, local, 0), axis=0)
        return self.leave(jnp.where(mine[..., None], rows, 0))

    def my_kv_heads(self, n_head: int, n_kv_head: int, local_heads: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Keys and values (B, T, heads, D) for this device's query heads.

        Where every device computes all key/value heads because their number does not divide, each query head gets a
        copy of its own.
        """
        if self.tensor is None or arrays[0].shape[2] * n_head == local_heads * n_kv_head:
            return arrays
        heads = self.offset(local_heads) + jnp.arange(local_heads)
        return tuple(jnp.take(a, heads // (n_head // n_kv_head), axis=2) for a in arrays)


WHOLE = Parallel()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _enter(x, axis):
    return x


_enter.defvjp(lambda x, axis: (x, None), lambda axis, _, d: (jax.lax.psum(d, axis),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _leave(x, axis):
    return jax.lax.psum(x, axis)


_leave.defvjp(lambda x, axis: (jax.lax.psum(x, axis), None), lambda axis, _, d: (d,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gather(stand_in, part, name, axis):
    return jax.lax.all_gather(part, name, axis=axis, tiled=True)


def _gather_fwd(stand_in, part, name, axis):
    return _gather(stand_in, part, name, axis), (jnp.zeros((), stand_in.dtype), part)


def _gather_bwd(name, axis, residuals, d):
    like, part = residuals
    return d.astype(like.dtype), jnp.zeros_like(part)


_gather.defvjp(_gather_fwd, _gather_bwd)


def keep_all_but_gathered(primitive, *_, call_jaxpr=None, **__) -> bool:
    """A `jax.checkpoint` policy: gathered parameters are gathered again in the backward pass, the rest is kept."""
    inner = call_jaxpr.eqns if call_jaxpr is not None else ()  # `_gather` comes as one call, with its body
    return not any(equation.primitive.name == "all_gather" for equation in inner)
