"""Where arrays live: the mesh, and which mesh axis shards which dimension. No `PartitionSpec` is written elsewhere.

The mesh has three axes. Rows of a batch are sharded over `data` and `fsdp`. Parameters, laid out by layer, are the same
along `data`, sharded over `fsdp` (gathered where a layer needs them) and over `tensor` (heads, hidden units of the MLP,
vocabulary: as in Megatron-LM, arXiv:1909.08053). Gradients and optimizer state, laid out by treatment
(`optim.group`), are sharded over all devices: stacks between full matrices, so that Newton-Schulz needs nothing from
elsewhere, embeddings along the width (ZeRO, arXiv:1910.02054). `training/zero.py` moves arrays between the two layouts.
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.parameters import Parameter, map_leaves
from nanochat_jax.utils.errors import InputError

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)  # outermost first: neighbours share the most talkative axis
ROW_AXES = (DATA, FSDP)  # different rows; devices along TENSOR share theirs

# Logical axis of the table of parameters -> the mesh axis that shards it; those not named here are never sharded.
# Column-parallel kernels are sharded over TENSOR along their outputs, row-parallel ones along their inputs, so that a
# sum over TENSOR follows only the latter.
MESH_AXES = {
    "width": FSDP,
    "value_rows": FSDP,
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "kv_gates": TENSOR,
    "hidden": TENSOR,
}
# logical axes along the key/value heads, whose number need not divide (`kv_heads_divide`)
OF_KV_HEADS = {"kv_heads", "kv_gates"}


# ---------------------------------------------------------------------------------------------------------------------
# the mesh


def make_mesh(devices: list | None = None, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The mesh (data, fsdp, tensor) over the given devices (default: all); `data` takes what the other two leave.

    Raises ValueError naming --fsdp and --tensor if their product does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or tensor < 1 or len(devices) % (fsdp * tensor):
        raise InputError(
            f"--fsdp={fsdp} and --tensor={tensor} do not fit {len(devices)} devices: their product must divide them"
        )
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3, devices=devices)


def row_shards(mesh: Mesh) -> int:
    """Into how many shards the rows of a training batch are divided: devices along `tensor` share theirs."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def check(config: GPTConfig, mesh: Mesh) -> None:
    """Raises ValueError, naming the flag, if the model cannot be sharded over this mesh."""
    tensor, rows = mesh.shape[TENSOR], row_shards(mesh)
    for what, size in (("heads", config.n_head), ("vocabulary entries", config.padded_vocab_size)):
        if size % tensor:
            raise InputError(f"--tensor={tensor} must divide the number of {what}, which is {size}")
    sizes = {"width": config.n_embd} | ({"vocabulary": config.padded_vocab_size} if config.value_embeds else {})
    for what, size in sizes.items():
        if mesh.shape[FSDP] > 1 and size % rows:
            raise InputError(
                f"--fsdp={mesh.shape[FSDP]}: the {what}, {size}, must be a multiple of {rows}, the number of devices "
                "divided by --tensor"
            )


# ---------------------------------------------------------------------------------------------------------------------
# parameters and batches


def dimension(kind: Parameter, mesh_axis: str) -> int | None:
    """The dimension of a parameter that `mesh_axis` is to shard; None: it has none such."""
    return next((i for i, axis in enumerate(kind.axes) if MESH_AXES.get(str(axis)) == mesh_axis), None)


def kv_heads_divide(config: GPTConfig, mesh: Mesh) -> bool:
    """Whether key/value heads can be sharded over TENSOR. Where not, every device computes all of them for its own
    query heads: parameters of theirs are full everywhere, and each device has a part of the sum that is their gradient.
    """
    return config.n_kv_head % mesh.shape[TENSOR] == 0


def sums_over_tensor(config: GPTConfig, mesh: Mesh, kind: Parameter) -> bool:
    """Whether the gradient of a parameter is the sum of those of the devices along TENSOR (see `kv_heads_divide`)."""
    return not OF_KV_HEADS.isdisjoint(kind.axes) and not kv_heads_divide(config, mesh)


def mesh_axes(config: GPTConfig, mesh: Mesh, kind: Parameter) -> list[str | None]:
    """The mesh axis that shards each dimension of a parameter, None where none does."""
    axes = [MESH_AXES.get(str(axis)) for axis in kind.axes]
    return [None if a == TENSOR and sums_over_tensor(config, mesh, kind) else a for a in axes]


def parameter_specs(config: GPTConfig, mesh: Mesh):
    """A PartitionSpec for every parameter, in the model's tree."""

    def spec(leaf):
        axes = mesh_axes(config, mesh, leaf.kind)
        return PartitionSpec(*[axis if axis and mesh.shape[axis] > 1 else None for axis in axes])

    return map_leaves(config, spec)


def fsdp_dimensions(config: GPTConfig):
    """The dimension of every parameter that FSDP shards, None where there is none, in the model's tree."""
    return map_leaves(config, lambda leaf: dimension(leaf.kind, FSDP))


def replicated_spec() -> PartitionSpec:
    return PartitionSpec()


def rows_spec() -> PartitionSpec:
    """The first dimension, whatever follows, is sharded over all devices."""
    return PartitionSpec(AXES)


def rows_over_data_spec() -> PartitionSpec:
    """The same on a mesh that has devices along DATA alone, as compiled programs name it in what they return: an array
    that is made by the other name makes the first program it meets one of its own kind."""
    return PartitionSpec(DATA)


def batch_spec(ndim: int = 3) -> PartitionSpec:
    """Outside training (every device holds the full model): rows of (..., rows, T) arrays, sharded over all devices."""
    return PartitionSpec(*[None] * (ndim - 2), AXES, None)


def training_batch_spec() -> PartitionSpec:
    """Rows of (accumulation, rows, T) arrays, sharded over the devices that have different rows."""
    return PartitionSpec(None, ROW_AXES, None)


# ---------------------------------------------------------------------------------------------------------------------
# gradients and optimizer state


def stack_spec() -> PartitionSpec:
    """Full matrices, different ones on every device."""
    return PartitionSpec(AXES, None, None)


def adamw_spec(config: GPTConfig, mesh: Mesh, kind: Parameter) -> PartitionSpec:
    """The dimension that FSDP shards is sharded over DATA too, so over all devices with different rows; a parameter
    without one is replicated. FSDP comes first: a parameter's shard is then the gathered slices of a line of DATA."""
    return PartitionSpec(*[(FSDP, DATA) if axis == FSDP else axis for axis in mesh_axes(config, mesh, kind)])


def replicas(mesh: Mesh, spec: PartitionSpec) -> int:
    """On how many devices each entry of an array of this PartitionSpec lives."""
    entries = [(entry,) if isinstance(entry, str) else entry for entry in spec if entry is not None]
    return mesh.size // math.prod(mesh.shape[axis] for entry in entries for axis in entry)


def storage_specs(tree, mesh: Mesh):
    """For grouped trees without padding, as checkpoints store them: sharded along any dimension that divides."""

    def spec(leaf):
        axis = next((i for i, size in enumerate(leaf.shape) if size % mesh.size == 0), None)
        return PartitionSpec(*[AXES if i == axis else None for i in range(len(leaf.shape))])

    return jax.tree.map(spec, tree)


def named(mesh: Mesh, specs):
    """NamedShardings for a tree of PartitionSpecs."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=is_spec)


def is_spec(value) -> bool:
    """Whether this is a PartitionSpec, for trees of them."""
    return isinstance(value, PartitionSpec)
