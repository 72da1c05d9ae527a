"""Moves between the two layouts of `sharding.py`, per device: gradients to the groups, updates back to the parameters.

Gradients of whole matrices are summed and dealt so that every device gets its own few (one reduce-scatter per group);
what the optimizer makes of them is collected again (one all-gather per group). Where parameters are cut over `tensor`
or `fsdp`, an all-to-all puts matrices together or takes them apart on the way.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanochat_jax.model.gpt import GPTConfig, Params, abstract
from nanochat_jax.parallel import sharding
from nanochat_jax.parallel.sharding import AXES, DATA, FSDP, ROW_AXES, TENSOR
from nanochat_jax.training.optim import Groups, group, pad_stacks, stack_members, ungroup


def padded_groups(params: Params, mesh: Mesh, like: Params | None = None) -> Groups:
    """The grouped parameters as the optimizer sees them: stacks filled up with zero matrices to a multiple of the
    number of devices, embeddings with zero columns to one of the devices that share the width."""
    groups = pad_stacks(group(params, like), mesh.size)
    extra = -groups["embedding"].shape[1] % sharding.row_shards(mesh)
    groups["embedding"] = jnp.pad(groups["embedding"], ((0, 0), (0, extra)))
    groups["unembedding"] = jnp.pad(groups["unembedding"], ((0, extra), (0, 0)))
    return groups


@dataclass(frozen=True)
class Dealer:
    """The moves for one model on one mesh; all methods run inside `jax.shard_map` over the whole mesh.

    A stack travels in one orientation: what is cut over `tensor` is its last axis, what is cut over `fsdp` its middle
    one. Row-parallel matrices are therefore transposed on the way.
    """

    config: GPTConfig
    mesh: Mesh

    def deal(self, grads: Params) -> Groups:
        """This device's part of the summed gradients, grouped. grads: whole over `fsdp`, cut over `tensor`."""
        groups = padded_groups(self._turn_rows(grads), self.mesh, abstract(self.config))
        return {
            "embedding": self._reduce(groups["embedding"], (FSDP, DATA), 1),
            "unembedding": self._reduce(groups["unembedding"], (FSDP, DATA), 0),
            "matrices": {name: self._deal_stack(name, stack) for name, stack in groups["matrices"].items()},
        }

    def collect(self, groups: Groups) -> Params:
        """The inverse for updates: laid out by layer, cut over `fsdp` and `tensor` as the parameters are."""
        width = self.config.n_embd // self._size(FSDP)
        gathered = {
            "embedding": self._gather(groups["embedding"], (DATA,), 1)[:, :width],
            "unembedding": self._gather(groups["unembedding"], (DATA,), 0)[:width],
            "matrices": {name: self._collect_stack(name, stack) for name, stack in groups["matrices"].items()},
        }
        return self._turn_rows(ungroup(self.config, gathered))

    def embeddings(self, params: Params) -> Groups:
        """This device's slices of both embeddings, as `deal` cuts their gradients."""

        def mine(table, axis):
            table = jnp.pad(
                table, [(0, -size % self._size(DATA) if i == axis else 0) for i, size in enumerate(table.shape)]
            )
            size = table.shape[axis] // self._size(DATA)
            return jax.lax.dynamic_slice_in_dim(table, jax.lax.axis_index(DATA) * size, size, axis)

        return {"embedding": mine(params["wte"]["embedding"], 1), "unembedding": mine(params["lm_head"]["kernel"], 0)}

    def _deal_stack(self, name: str, stack):
        """(n, rows, columns / tensor) -> (n / devices, rows, columns), summed over rows of the batch."""
        if self._kept_whole(name):
            return self._reduce(stack, AXES, 0)
        stack = self._swap(self._reduce(stack, ROW_AXES, 0), TENSOR, split=0, join=2)
        return self._turn(name, stack)

    def _collect_stack(self, name: str, stack):
        """(n / devices, rows, columns) -> (n, rows / fsdp, columns / tensor)."""
        if self._kept_whole(name):
            stack = self._gather(stack, (TENSOR,), 0)
        else:
            stack = self._swap(self._turn(name, stack), TENSOR, split=2, join=0)
        return self._gather(self._swap(stack, FSDP, split=1, join=0), (DATA,), 0)

    # ---- orientation

    def _travels_turned(self, name: str) -> bool:
        cut = self._size(TENSOR) * self._size(FSDP) > 1
        return cut and name.startswith("h/") and sharding.parameter_axes(self.config, self.mesh, name)[0] == 1

    def _turn_rows(self, params: Params) -> Params:
        """Kernels between their own and their travelling orientation."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x.T if self._travels_turned(sharding.path_name(path)) else x, params
        )

    def _turn(self, name: str, stack):
        """The same for this device's whole matrices of a stack, after or before travelling."""
        turned = [self._travels_turned(path) for path in stack_members(self.config)[name]]
        if len(set(turned)) == 1:
            return stack.mT if turned[0] else stack
        turned += [False] * (-len(turned) % self.mesh.size)
        mine = jnp.array(turned).reshape(self.mesh.size, -1)[jax.lax.axis_index(AXES)]
        return jnp.where(mine[:, None, None], stack.mT, stack)  # of one shape, so square

    def _kept_whole(self, name: str) -> bool:
        """Whether `tensor` does not cut the matrices of this stack: keys and values of too few heads."""
        paths = stack_members(self.config)[name]
        return any(sharding.parameter_axes(self.config, self.mesh, path)[1] is None for path in paths)

    # ---- collectives that are nothing on axes of size one

    def _size(self, axis: str) -> int:
        return self.mesh.shape[axis]

    def _reduce(self, x, axes, dimension: int):
        axes = tuple(a for a in axes if self._size(a) > 1)
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True) if axes else x

    def _gather(self, x, axes, dimension: int):
        axes = tuple(a for a in axes if self._size(a) > 1)
        return jax.lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x

    def _swap(self, x, axis: str, split: int, join: int):
        return jax.lax.all_to_all(x, axis, split, join, tiled=True) if self._size(axis) > 1 else x
