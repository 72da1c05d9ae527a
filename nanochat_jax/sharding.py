"""Which array lives where: the mesh and the one table of partition rules. No `PartitionSpec` is written elsewhere.

Parameters are replicated. Gradients and optimizer state live in *grouped* form (see `optim.group`): embedding,
unembedding and one stack of matrices per shape, each cut over the devices, so that the optimizer of every device works
on its own slice: whole matrices for Muon (no collective inside Newton-Schulz), rows or columns for AdamW (ZeRO).
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def make_mesh(devices: list | None = None) -> Mesh:
    """A one-dimensional mesh over the given devices (default: all of them)."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA_AXIS,), (AxisType.Auto,), devices=devices)


def replicated_spec() -> PartitionSpec:
    return PartitionSpec()


def batch_spec(ndim: int = 3) -> PartitionSpec:
    """Rows of (accumulation, rows, T) arrays, or of (rows, T) arrays, are dealt to the devices."""
    return PartitionSpec(*[None] * (ndim - 2), DATA_AXIS, None)


def rows_spec() -> PartitionSpec:
    """Leading axis dealt to the devices: the engine's slots, and what it keeps per device."""
    return PartitionSpec(DATA_AXIS)


def group_axis(name: str, shape: tuple[int, ...], n_devices: int) -> int | None:
    """The axis along which a grouped array is cut, or None if no axis divides and it stays replicated.

    Stacks of matrices are cut between matrices; both embeddings along the vocabulary where it divides, else along the
    width.
    """
    preferred = {"matrices": (0,), "embedding": (0, 1), "unembedding": (1, 0)}[name]
    return next((axis for axis in preferred if axis < len(shape) and shape[axis] % n_devices == 0), None)


def group_spec(name: str, shape: tuple[int, ...], n_devices: int) -> PartitionSpec:
    axis = group_axis(name, shape, n_devices)
    return PartitionSpec(*[DATA_AXIS if i == axis else None for i in range(len(shape))])


def group_name(path, leaf) -> str | None:
    """Which group a leaf of grouped parameters, gradients or optimizer state belongs to; None for step counts.

    The embeddings are found by their name anywhere in the path, the stacks by having three axes.
    """
    keys = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    named = next((key for key in keys if key in ("embedding", "unembedding")), None)
    return named or ("matrices" if len(leaf.shape) == 3 else None)


def grouped_specs(tree, n_devices: int):
    """A PartitionSpec for every leaf of a grouped tree; leaves outside the groups (step counts) are replicated."""

    def spec(path, leaf):
        name = group_name(path, leaf)
        return PartitionSpec() if name is None else group_spec(name, leaf.shape, n_devices)

    return jax.tree_util.tree_map_with_path(spec, tree)


def named(mesh: Mesh, specs):
    """NamedShardings for a tree of PartitionSpecs."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
