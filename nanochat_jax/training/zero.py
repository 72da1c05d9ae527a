"""Moves gradients to where the optimizer works on them, and its updates back to where the parameters are (ZeRO).

The shape of a gradient on each device, on its way through a step. N = d f t devices along (data, fsdp, tensor); a stack
holds n matrices of (r, c), n padded to a multiple of N; V tokens, width C padded to a multiple of d f.

                                          Muon: stack of matrices    AdamW: embedding     AdamW: vector (k,)
    1 accumulated over micro-batches      n times (r, c/t)           (V/t, C)             (k,)
    2 stacked and padded                  (n, r, c/t)                (V/t, C)             (k,)
    3 summed over data and fsdp           (n/(d f), r, c/t)          (V/t, C/(d f))       (k,)       reduce-scatter
    4 exchanged along tensor              (n/N, r, c)                .                    .          all-to-all
      clipping and the optimizer work here: full matrices for Newton-Schulz, a d f-th of each embedding
    5 exchanged along tensor              (n/(d f), r, c/t)          .                    .          all-to-all
    6 exchanged along fsdp                (n/d, r/f, c/t)            .                    .          all-to-all
    7 gathered along data                 (n, r/f, c/t)              (V/t, C/f)           (k,)       all-gather
    8 added to the parameters             n times (r/f, c/t)         (V/t, C/f)           (k,)

Collectives over a mesh axis of size one are left out, so data parallelism alone has steps 3 and 7. Matrices travel in
one orientation: what `tensor` shards is their last dimension, so row-parallel ones are transposed in steps 1 and 8, and
once more in step 4 and 5. Two exceptions: matrices that `tensor` does not shard (keys and values of too few heads) are
summed over it too in step 3, and gathered along it in step 5; matrices that `fsdp` does not shard are gathered along it
in step 6. A vector is summed everywhere (all-reduce) and updated on all devices alike.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.parameters import MATRICES, Leaf, Params, map_leaves
from nanochat_jax.parallel import sharding
from nanochat_jax.parallel.sharding import AXES, DATA, FSDP, ROW_AXES, TENSOR
from nanochat_jax.training.optim import Groups, adamw_members, group, pad_stacks, stack_members, ungroup


def padded_groups(config: GPTConfig, params: Params, mesh: Mesh) -> Groups:
    """The grouped parameters as the optimizer sees them: stacks padded with zero matrices to a multiple of the number
    of devices, AdamW's arrays with zeros to one of the devices that share the dimension (the width)."""
    groups = pad_stacks(group(config, params), mesh.size)
    members = adamw_members(config)
    arrays = {name: groups[name] for name in members}

    def pad(leaf: Leaf, array):
        return _pad(array, sharding.dimension(leaf.kind, FSDP), sharding.row_shards(mesh))

    return {**jax.tree.map(pad, members, arrays), MATRICES: groups[MATRICES]}


def group_specs(config: GPTConfig, mesh: Mesh) -> Groups:
    """How every array of `padded_groups` is sharded, as a tree of PartitionSpecs."""
    adamw = jax.tree.map(lambda leaf: sharding.adamw_spec(config, mesh, leaf.kind), adamw_members(config))
    return {**adamw, MATRICES: dict.fromkeys(stack_members(config), sharding.stack_spec())}


def group_replicas(config: GPTConfig, mesh: Mesh) -> Groups:
    """On how many devices each entry of an array of `padded_groups` lives, as a tree of numbers."""
    return jax.tree.map(lambda spec: sharding.replicas(mesh, spec), group_specs(config, mesh), is_leaf=sharding.is_spec)


@dataclass(frozen=True)
class Zero:
    """The moves for one model on one mesh; all methods run inside `jax.shard_map` over the whole mesh."""

    config: GPTConfig
    mesh: Mesh

    def scatter_gradients(self, grads: Params) -> Groups:
        """Steps 2 to 4: this device's share of the summed gradients, grouped. grads: full over `fsdp`, sharded over
        `tensor`."""
        groups = padded_groups(self.config, self._turn_row_parallel(grads), self.mesh)
        members = adamw_members(self.config)
        adamw = jax.tree.map(self._scatter_adamw, members, {name: groups[name] for name in members})
        return {**adamw, MATRICES: {name: self._scatter_stack(name, s) for name, s in groups[MATRICES].items()}}

    def gather_updates(self, groups: Groups) -> Params:
        """Steps 5 to 8, the inverse: laid out by layer, sharded over `fsdp` and `tensor` as the parameters are."""
        members = adamw_members(self.config)
        adamw = jax.tree.map(self._gather_adamw, members, {name: groups[name] for name in members})
        stacks = {name: self._gather_stack(name, stack) for name, stack in groups[MATRICES].items()}
        return self._turn_row_parallel(ungroup(self.config, {**adamw, MATRICES: stacks}))

    def adamw_slices(self, params: Params) -> Groups:
        """This device's slices of the parameters of AdamW, as `scatter_gradients` makes them of the gradients."""

        def mine(leaf: Leaf):
            array = params
            for key in leaf.path.split("/"):
                array = array[key]
            dimension = sharding.dimension(leaf.kind, FSDP)
            if dimension is None:
                return array
            array = _pad(array, dimension, self._size(DATA))
            size = array.shape[dimension] // self._size(DATA)
            return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(DATA) * size, size, dimension)

        return jax.tree.map(mine, adamw_members(self.config))

    # ---- one array of AdamW's

    def _scatter_adamw(self, leaf: Leaf, array):
        dimension = sharding.dimension(leaf.kind, FSDP)
        if sharding.sums_over_tensor(self.config, self.mesh, leaf.kind):
            array = self._sum(array, (TENSOR,))
        return self._sum(array, ROW_AXES) if dimension is None else self._reduce(array, (FSDP, DATA), dimension)

    def _gather_adamw(self, leaf: Leaf, array):
        dimension = sharding.dimension(leaf.kind, FSDP)
        if dimension is None:
            return array
        array, unpadded = self._gather(array, (DATA,), dimension), leaf.shape[dimension] // self._size(FSDP)
        if array.shape[dimension] == unpadded:
            return array
        return jax.lax.slice_in_dim(array, 0, unpadded, axis=dimension)

    # ---- one stack of Muon's

    def _scatter_stack(self, name: str, stack):
        """(n, r, c/t) -> (n/N, r, c), summed over the rows of the batch."""
        if not self._sharded_over_tensor(name):
            return self._reduce(stack, AXES, 0)
        stack = self._exchange(self._reduce(stack, ROW_AXES, 0), TENSOR, split=0, join=2)
        return self._turn_stack(name, stack)

    def _gather_stack(self, name: str, stack):
        """(n/N, r, c) -> (n, r/f, c/t)."""
        if self._sharded_over_tensor(name):
            stack = self._exchange(self._turn_stack(name, stack), TENSOR, split=2, join=0)
        else:
            stack = self._gather(stack, (TENSOR,), 0)
        if all(sharding.dimension(leaf.kind, FSDP) is None for leaf in stack_members(self.config)[name]):
            return self._gather(stack, ROW_AXES, 0)
        return self._gather(self._exchange(stack, FSDP, split=1, join=0), (DATA,), 0)

    def _sharded_over_tensor(self, name: str) -> bool:
        members = stack_members(self.config)[name]
        return not any(sharding.sums_over_tensor(self.config, self.mesh, leaf.kind) for leaf in members)

    # ---- orientation

    def _turned(self, leaf: Leaf) -> bool:
        """Whether a matrix travels transposed: it is row-parallel, and the mesh shards matrices at all."""
        sharded = self._size(TENSOR) * self._size(FSDP) > 1
        return sharded and leaf.kind.group == MATRICES and sharding.dimension(leaf.kind, TENSOR) == 0

    def _turn_row_parallel(self, params: Params) -> Params:
        """Matrices between their own and their travelling orientation."""
        turned = map_leaves(self.config, self._turned)
        return jax.tree.map(lambda turn, x: x.T if turn else x, turned, params)

    def _turn_stack(self, name: str, stack):
        """The same for this device's full matrices of a stack, after or before travelling."""
        turned = [self._turned(leaf) for leaf in stack_members(self.config)[name]]
        if len(set(turned)) == 1:
            return stack.mT if turned[0] else stack
        turned += [False] * (-len(turned) % self.mesh.size)
        mine = jnp.array(turned).reshape(self.mesh.size, -1)[jax.lax.axis_index(AXES)]
        return jnp.where(mine[:, None, None], stack.mT, stack)  # of one shape, so square

    # ---- collectives, left out along mesh axes of size one

    def _size(self, axis: str) -> int:
        return self.mesh.shape[axis]

    def _wide(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if self._size(axis) > 1)

    def _sum(self, x, axes: tuple[str, ...]):
        wide = self._wide(axes)
        return jax.lax.psum(x, wide) if wide else x

    def _reduce(self, x, axes: tuple[str, ...], dimension: int):
        wide = self._wide(axes)
        return jax.lax.psum_scatter(x, wide, scatter_dimension=dimension, tiled=True) if wide else x

    def _gather(self, x, axes: tuple[str, ...], dimension: int):
        wide = self._wide(axes)
        return jax.lax.all_gather(x, wide, axis=dimension, tiled=True) if wide else x

    def _exchange(self, x, axis: str, split: int, join: int):
        return jax.lax.all_to_all(x, axis, split, join, tiled=True) if self._size(axis) > 1 else x


def _pad(array, dimension: int | None, multiple: int):
    """Zeros added at the end of a dimension, up to a multiple."""
    extra = [(0, -size % multiple if i == dimension else 0) for i, size in enumerate(array.shape)]
    return jnp.pad(array, extra)
