"""One optimizer step as a pure function, and the state it moves.

The step is written per device (`jax.shard_map`): gradients are accumulated locally over all micro-batches and reduced
once (reduce-scatter), the optimizer works on each device's slice, and its updates are gathered once. With automatic
sharding XLA would all-reduce every gradient in every micro-step.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.loss import target_weights, weighted_nll
from nanochat_jax.model.parameters import Params, abstract, init
from nanochat_jax.model.tensor_parallel import Parallel
from nanochat_jax.parallel import sharding
from nanochat_jax.training.optim import Optimizer, clip_by_global_norm, group, like_groups
from nanochat_jax.training.zero import Zero, group_replicas, group_specs, padded_groups


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters (plain tree, replicated unless the mesh has `fsdp` or `tensor`), optimizer state (over the grouped
    tree, sharded over all devices), steps taken (int32)."""

    params: Params
    opt_state: Any
    step: jax.Array


def state_specs(config: GPTConfig, optimizer: Optimizer, mesh: Mesh) -> Any:
    """How every array of the training state is sharded, as a TrainState of PartitionSpecs."""
    opt_state = like_groups(group_specs(config, mesh), sharding.replicated_spec(), optimizer.normuon)
    return TrainState(sharding.parameter_specs(config, mesh), opt_state, sharding.replicated_spec())  # pyright: ignore[reportArgumentType]


def init_state(config: GPTConfig, optimizer: Optimizer, mesh: Mesh, key: jax.Array) -> TrainState:
    """A fresh training state, created in place on the mesh."""
    sharding.check(config, mesh)
    return _make_state(lambda key: init(config, key), config, optimizer, mesh)(key)


def state_of(config: GPTConfig, params: Params, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """A training state at step 0 with given parameters (of an earlier stage) and a fresh optimizer."""
    sharding.check(config, mesh)
    placed = jax.device_put(params, sharding.named(mesh, sharding.parameter_specs(config, mesh)))
    return _make_state(lambda params: params, config, optimizer, mesh)(placed)


def _make_state(params_from, config: GPTConfig, optimizer: Optimizer, mesh: Mesh):
    def make(source):
        params = params_from(source)
        return TrainState(params, optimizer.init(padded_groups(config, params, mesh)), jnp.zeros((), jnp.int32))

    return jax.jit(make, out_shardings=sharding.named(mesh, state_specs(config, optimizer, mesh)))


def make_train_step(
    config: GPTConfig,
    optimizer: Optimizer,
    mesh: Mesh,
    grad_clip: float = 1.0,
    normalize: bool = True,
    guarded: bool = False,
):
    """A jitted (state, inputs, targets, weights) -> (state, metrics) that donates the state.

    Batches are (A, B, T): A micro-batches of B rows in all, B a multiple of `sharding.row_shards(mesh)`; target -1 is
    ignored. The loss is sum(weights * nll) / sum(weights) over the full (A, B, T) batch, however it is divided; without
    `normalize` it is sum(weights * nll): advantages, which may add up to nothing, bring their own denominator. The
    gradient is clipped by its global norm after averaging (the reference clips per rank, before). Metrics: loss,
    grad_norm, weight (sum of the weights), accepted, all float32 scalars. ValueError if the model cannot be sharded
    over this mesh.

    A step whose loss or gradient norm is not finite changes neither parameters nor moments, only the counts; its
    metric `accepted` is 0. With `guarded` the step takes one more argument, the largest (loss, grad_norm) that is
    accepted, float32 (2,); where they are -inf the step is held: not even the counts change, so that it can be
    repeated.
    """
    sharding.check(config, mesh)
    zero, replicas = Zero(config, mesh), group_replicas(config, mesh)

    def per_device(state: TrainState, inputs, targets, weights, limits=None):
        # 1. the denominator, counted over all devices before anything is divided by it. The weights are divided, not
        #    the sum of losses afterwards: that would be one more pass over the head's gradient
        weights = target_weights(targets, weights)
        total_weight = jax.lax.psum(weights.sum(), sharding.ROW_AXES)
        denominator = jnp.where((total_weight == 0) | (not normalize), 1.0, total_weight)

        # 2. loss and gradients of this device's rows, summed over the micro-batches
        loss, grads = _local_gradients(config, mesh, state.params, state.step, inputs, targets, weights / denominator)

        # 3. gradients summed over the devices and scattered, then clipped by their global norm
        with jax.named_scope("exchange"):
            grads = zero.scatter_gradients(grads)
            grads, grad_norm = clip_by_global_norm(grads, grad_clip, sharding.AXES, replicas)
            loss = jax.lax.psum(loss, sharding.ROW_AXES)

        # 4. is the step accepted? held: it is not even counted
        limits = jnp.full((2,), jnp.inf) if limits is None else limits
        accepted = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= limits[0]) & (grad_norm <= limits[1])
        held = limits[0] == -jnp.inf

        def choose(new, old):
            return jnp.where(~held if jnp.issubdtype(new.dtype, jnp.integer) else accepted, new, old)

        # 5. the optimizer, on this device's slices; a rejected update is zeroed here, before it is gathered, which
        #    needs no second copy of the parameters
        updates: Any
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, zero.adamw_slices(state.params))
        opt_state = jax.tree.map(choose, opt_state, state.opt_state)
        updates = jax.tree.map(lambda u: jnp.where(accepted, u, 0), updates)

        # 6. updates gathered; matrices decay, which depends on the sign of their updates; added to the parameters
        with jax.named_scope("exchange"):
            updates = zero.gather_updates(updates)
        updates = optimizer.decay_matrices(config, updates, state.params, state.opt_state.muon.count, accepted)
        params = jax.tree.map(jnp.add, state.params, updates)
        numbers = {"loss": loss, "grad_norm": grad_norm, "weight": total_weight}
        metrics = {**numbers, "accepted": accepted.astype(jnp.float32)}
        return TrainState(params, opt_state, choose(state.step + 1, state.step)), metrics

    state, rows = state_specs(config, optimizer, mesh), sharding.training_batch_spec()
    replicated = sharding.replicated_spec()
    limits = [replicated] if guarded else []
    step = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(state, rows, rows, rows, *limits),
        out_specs=(state, replicated),
        check_vma=False,  # per device on purpose: with tracking, grad() would reduce in every micro-step
    )
    placed, batch = sharding.named(mesh, state), sharding.named(mesh, rows)
    return jax.jit(
        step,
        in_shardings=(placed, batch, batch, batch, *sharding.named(mesh, limits)),
        out_shardings=(placed, sharding.named(mesh, replicated)),
        donate_argnums=0,
    )


def _local_gradients(config: GPTConfig, mesh: Mesh, params: Params, step, inputs, targets, weights):
    """(loss, gradients) of this device's rows, summed over its micro-batches (A, B, T): no reduction; matrices are full
    over `fsdp`, sharded over `tensor`."""
    parallel, differentiated = _parallel(config, mesh, params)

    def micro(x, y, w):
        return jax.value_and_grad(lambda p: weighted_nll(config, p, x, y, w, parallel))(differentiated)

    A = inputs.shape[0]
    if A == 1 and config.remat == "none" and mesh.devices.flat[0].platform == "cpu":
        return micro(inputs[0], targets[0], weights[0])

    def add(i, total):
        return jax.tree.map(jnp.add, total, micro(inputs[i], targets[i], weights[i]))

    shapes = jax.eval_shape(micro, inputs[0], targets[0], weights[0])
    # Outside a loop XLA on GPUs recomputes early and saves less (compiled for H100s, 32 rows: depth 20 46 GiB instead
    # of 39, depth 32 with blocks recomputed 91 instead of 27). It unrolls a loop that it knows to run once, so it must
    # not know: the step is never negative.
    count = jnp.where(step >= 0, A, 0) if A == 1 else A
    return jax.lax.fori_loop(0, count, add, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes))


def _parallel(config: GPTConfig, mesh: Mesh, params: Params) -> tuple[Parallel, Params]:
    """How this device takes part in the forward pass, and the tree to differentiate."""
    fsdp = mesh.shape[sharding.FSDP]
    tensor = sharding.TENSOR if mesh.shape[sharding.TENSOR] > 1 else None
    if fsdp == 1:
        return Parallel(tensor), params
    dimensions = sharding.fsdp_dimensions(config)

    def stand_in(shard, dimension):
        full = [size * (fsdp if i == dimension else 1) for i, size in enumerate(shard.shape)]
        return shard if dimension is None else jnp.zeros(full, shard.dtype)

    return Parallel(tensor, sharding.FSDP, params, dimensions), jax.tree.map(stand_in, params, dimensions)


# ---------------------------------------------------------------------------------------------------------------------
# device-independent form, as checkpoints store it: no padding


def abstract_state(config: GPTConfig, optimizer: Optimizer, mesh: Mesh, padded: bool = True) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: as training holds it, or unpadded as a checkpoint stores it."""
    shape = abstract(config)
    groups = jax.eval_shape(lambda p: padded_groups(config, p, mesh) if padded else group(config, p), shape)
    state = TrainState(shape, jax.eval_shape(optimizer.init, groups), jax.ShapeDtypeStruct((), jnp.int32))  # pyright: ignore[reportArgumentType]
    specs = state_specs(config, optimizer, mesh)
    if not padded:
        specs = TrainState(specs.params, sharding.storage_specs(state.opt_state, mesh), specs.step)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, sharding.named(mesh, specs)
    )


def strip_padding(state: TrainState, target: TrainState) -> TrainState:
    """The state without the padding: sliced to the shapes of `target`."""
    return jax.tree.map(lambda a, t: a if a.shape == t.shape else a[tuple(slice(s) for s in t.shape)], state, target)


def restore_padding(state: TrainState, target: TrainState) -> TrainState:
    """The inverse: zeros added up to the shapes of `target`, placed by its shardings."""

    def pad(tree):
        def one(a, t):
            missing = [(0, want - have) for have, want in zip(a.shape, t.shape, strict=True)]
            return jnp.pad(a, missing) if missing else a

        return jax.tree.map(one, tree, target)

    # through jit also where nothing is padded: arrays as restored are not reliably donatable
    return jax.jit(pad, out_shardings=jax.tree.map(lambda t: t.sharding, target))(state)
