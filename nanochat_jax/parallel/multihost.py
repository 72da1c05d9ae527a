"""What several processes of one job (see `cluster.py`) do together: agree, wait, and share out rows and arrays.

Everything here also works, and costs nothing, in a process that is alone.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from nanochat_jax.parallel import sharding


def several() -> bool:
    """Whether this process is one of several. False before JAX has started as one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this process writes what there must be one of."""
    return not several() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if several():
        multihost_utils.sync_global_devices(name)


def agree(value: bool) -> bool:
    """The main process's value, in all processes."""
    if not several():
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def local_mesh(mesh: Mesh) -> Mesh:
    """The mesh itself, or, in a job of several processes, one over this process's devices: for what every process
    computes for itself (evaluations, samples, rollouts)."""
    return sharding.make_mesh(jax.local_devices()) if several() else mesh


def local(params: Any, mesh: Mesh) -> Any:
    """Full parameters on each of this process's devices; untouched where they are that already."""
    if not several() and sharding.row_shards(mesh) == mesh.shape[sharding.DATA] == mesh.size:
        return params
    whole = jax.jit(lambda p: p, out_shardings=sharding.named(mesh, sharding.replicated_spec()))(params)
    if not several():
        return whole
    here = sharding.named(local_mesh(mesh), sharding.replicated_spec())

    def own(array):
        return jax.make_array_from_single_device_arrays(array.shape, here, [s.data for s in array.addressable_shards])

    return jax.tree.map(own, whole)


def to_host(params: Any) -> Any:
    """The same arrays of every process as numpy arrays, which can be placed on devices of all processes; untouched
    where this process works alone."""
    return jax.tree.map(np.asarray, params) if several() else params


def own_rows(mesh: Mesh, rows: int) -> range:
    """Which rows of a micro-batch of `rows` this process's devices work on."""
    where = sharding.named(mesh, sharding.training_batch_spec())
    parts = [index[1].indices(rows) for index in where.addressable_devices_indices_map((1, rows, 1)).values()]
    return range(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def place_batch(mesh: Mesh, batch: Any, whole: bool = False) -> Any:
    """Arrays (A, own rows, T) of every process, or (A, all rows, T) if `whole`, as global arrays (A, rows, T);
    untouched where this process works alone."""
    if not several():
        return batch
    where, shards = sharding.named(mesh, sharding.training_batch_spec()), sharding.row_shards(mesh)
    rows = batch[0].shape[1] if whole else batch[0].shape[1] * shards // len(own_rows(mesh, shards))
    first = 0 if whole else own_rows(mesh, rows).start

    def place(array):
        def part(index):
            start, stop, _ = index[1].indices(rows)
            return array[:, start - first : stop - first]

        return jax.make_array_from_callback((array.shape[0], rows, array.shape[2]), where, part)

    return tuple(place(a) for a in batch)


def whole_batch(batch):
    """A batch of global arrays as numpy arrays, in every process."""
    if not several():
        return tuple(np.asarray(a) for a in batch)
    return tuple(np.asarray(multihost_utils.process_allgather(a, tiled=True)) for a in batch)
