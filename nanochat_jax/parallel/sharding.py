"""Which array lives where: the mesh and the one table of partition rules. No `PartitionSpec` is written elsewhere.

The mesh has three axes. Rows of a batch are dealt over `data` and `fsdp`. Parameters, laid out by layer, are the same
along `data`, cut over `fsdp` (gathered where a layer needs them) and over `tensor` (heads, hidden units of the MLP,
vocabulary: as in Megatron-LM, arXiv:1909.08053). Gradients and optimizer state, laid out by treatment
(`optim.group`), are always cut over all devices: stacks between whole matrices, so that Newton-Schulz needs nothing
from elsewhere, embeddings along the width (ZeRO, arXiv:1910.02054). `dealing.py` moves arrays between the two layouts.
"""

import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanochat_jax.model.gpt import GPTConfig, abstract
from nanochat_jax.utils.errors import InputError

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)  # outermost first: neighbours share the most talkative axis
ROW_AXES = (DATA, FSDP)  # different rows; devices along TENSOR share theirs

# Parameter (without layer number and "kernel"): (axis cut over FSDP, axis cut over TENSOR). Column-parallel kernels are
# cut along their outputs, row-parallel ones along their inputs, so a sum over TENSOR follows only the latter.
PARAMETERS = {
    "wte": (1, 0),
    "lm_head": (0, 1),
    "attn/c_q": (0, 1),
    "attn/c_k": (0, 1),
    "attn/c_v": (0, 1),
    "attn/c_proj": (1, 0),
    "mlp/c_fc": (0, 1),
    "mlp/c_proj": (1, 0),
}

# Group: the mesh axes that cut each of its axes. Within the width, FSDP comes before DATA: a parameter's part is then
# the gathered slices of a whole line of DATA.
GROUPS = {
    "embedding": (TENSOR, (FSDP, DATA)),
    "unembedding": ((FSDP, DATA), TENSOR),
    "matrices": (AXES, None, None),
}


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
    """Into how many parts the rows of a training batch are cut: devices along `tensor` share theirs."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def check(config: GPTConfig, mesh: Mesh) -> None:
    """Raises ValueError, naming the flag, if the model cannot be cut for this mesh."""
    tensor, rows = mesh.shape[TENSOR], row_shards(mesh)
    for what, size in (("heads", config.n_head), ("vocabulary entries", config.vocab_size)):
        if size % tensor:
            raise InputError(f"--tensor={tensor} must divide the number of {what}, which is {size}")
    if mesh.shape[FSDP] > 1 and config.n_embd % rows:
        raise InputError(
            f"--fsdp={mesh.shape[FSDP]}: the width, {config.n_embd}, must be a multiple of {rows}, the number of "
            "devices divided by --tensor"
        )


# ---------------------------------------------------------------------------------------------------------------------
# parameters and batches


def parameter_axes(config: GPTConfig, mesh: Mesh, name: str) -> tuple[int, int | None]:
    """(axis cut over FSDP, axis cut over TENSOR) of the parameter with this path, such as "h/0/attn/c_q/kernel".

    Keys and values are whole everywhere (None) if their heads do not divide.
    """
    key = re.sub(r"^h/\d+/|/(kernel|embedding)$", "", name)
    fsdp, tensor = PARAMETERS[key]
    whole = key in ("attn/c_k", "attn/c_v") and config.n_kv_head % mesh.shape[TENSOR] != 0
    return fsdp, None if whole else tensor


def path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_specs(config: GPTConfig, mesh: Mesh):
    """A PartitionSpec for every parameter, in the model's tree."""

    def spec(path, leaf):
        fsdp, tensor = parameter_axes(config, mesh, path_name(path))
        axes = [TENSOR if i == tensor else FSDP if i == fsdp else None for i in range(2)]
        return PartitionSpec(*[axis if axis and mesh.shape[axis] > 1 else None for axis in axes])

    return jax.tree_util.tree_map_with_path(spec, abstract(config))


def replicated_spec() -> PartitionSpec:
    return PartitionSpec()


def rows_spec() -> PartitionSpec:
    """The first axis, whatever follows, is dealt to all devices."""
    return PartitionSpec(AXES)


def rows_over_data_spec() -> PartitionSpec:
    """The same on a mesh that has devices along DATA alone, as compiled programs name it in what they return: an array
    that is made by the other name makes the first program it meets one of its own kind."""
    return PartitionSpec(DATA)


def batch_spec(ndim: int = 3) -> PartitionSpec:
    """Outside training (every device holds the whole model): rows of (..., rows, T) arrays go to all devices."""
    return PartitionSpec(*[None] * (ndim - 2), AXES, None)


def training_batch_spec() -> PartitionSpec:
    """Rows of (accumulation, rows, T) arrays."""
    return PartitionSpec(None, ROW_AXES, None)


# ---------------------------------------------------------------------------------------------------------------------
# groups: gradients and optimizer state


def group_name(path, leaf) -> str | None:
    """Which group a leaf of grouped parameters, gradients or optimizer state belongs to; None for step counts.

    The embeddings are found by their name anywhere in the path, the stacks by having three axes.
    """
    named = next((key for key in path_name(path).split("/") if key in ("embedding", "unembedding")), None)
    return named or ("matrices" if len(leaf.shape) == 3 else None)


def grouped_specs(tree):
    """A PartitionSpec for every leaf of a grouped tree; leaves outside the groups (step counts) are replicated."""

    def spec(path, leaf):
        name = group_name(path, leaf)
        return PartitionSpec() if name is None else PartitionSpec(*GROUPS[name])

    return jax.tree_util.tree_map_with_path(spec, tree)


def storage_specs(tree, mesh: Mesh):
    """For grouped trees without padding, as checkpoints store them: cut along any axis that divides by all devices."""

    def spec(leaf):
        axis = next((i for i, size in enumerate(leaf.shape) if size % mesh.size == 0), None)
        return PartitionSpec(*[AXES if i == axis else None for i in range(len(leaf.shape))])

    return jax.tree.map(spec, tree)


def named(mesh: Mesh, specs):
    """NamedShardings for a tree of PartitionSpecs."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
