"""One optimizer step as a pure function, and the state it moves.

Gradients are accumulated locally on each device over all micro-batches and reduced once (reduce-scatter), the optimizer
works on each device's slice, and the updated parameters are gathered once. Written the automatic way, XLA would
all-reduce every gradient in every micro-step.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nanochat_jax import sharding
from nanochat_jax.gpt import GPTConfig, Params, abstract, init
from nanochat_jax.loss import target_weights, weighted_nll
from nanochat_jax.optim import clip_by_global_norm, group, pad_stacks, ungroup, unpad_stacks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters (plain tree, replicated), optimizer state (over the grouped tree, sharded), steps taken (int32)."""

    params: Params
    opt_state: Any
    step: jax.Array


def padded_groups(params: Params, n_devices: int):
    """The grouped parameters as the optimizer sees them: stacks padded with zero matrices to the device count."""
    return pad_stacks(group(params), n_devices)


def state_shardings(config: GPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where every array of the training state lives, as a TrainState of NamedShardings."""
    groups = jax.eval_shape(lambda p: padded_groups(p, mesh.size), abstract(config))
    opt = jax.eval_shape(optimizer.init, groups)
    whole = sharding.replicated_spec()
    return TrainState(
        params=sharding.named(mesh, jax.tree.map(lambda _: whole, abstract(config))),
        opt_state=sharding.named(mesh, sharding.grouped_specs(opt, mesh.size)),
        step=sharding.named(mesh, whole),
    )


def init_state(config: GPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh, key: jax.Array) -> TrainState:
    """A fresh training state, created in place on the mesh."""
    return _make_state(lambda key: init(config, key), config, optimizer, mesh)(key)


def state_of(config: GPTConfig, params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A training state at step 0 with given parameters (of an earlier stage) and a fresh optimizer."""
    placed = jax.device_put(params, sharding.named(mesh, sharding.replicated_spec()))
    return _make_state(lambda params: params, config, optimizer, mesh)(placed)


def _make_state(params_from, config: GPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh):
    def make(source):
        params = params_from(source)
        return TrainState(params, optimizer.init(padded_groups(params, mesh.size)), jnp.zeros((), jnp.int32))

    return jax.jit(make, out_shardings=state_shardings(config, optimizer, mesh))


def make_train_step(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    grad_clip: float = 1.0,
    normalize: bool = True,
    guarded: bool = False,
):
    """A jitted (state, inputs, targets, weights) -> (state, metrics) that donates the state.

    Batches are (A, B, T): A micro-batches of B rows in all, B a multiple of the mesh size; target -1 is ignored. The
    loss is sum(weights * nll) / sum(weights) over the whole (A, B, T) batch, whatever its split; without `normalize`
    it is sum(weights * nll): advantages, which may add up to nothing, bring their own denominator. The gradient is
    clipped by its global norm after averaging (the reference clips per rank, before). Metrics: loss, grad_norm,
    weight (sum of the weights), kept, all float32 scalars.

    A step whose loss or gradient norm is not finite changes neither parameters nor moments, only the counts; its
    metric `kept` is 0. With `guarded` the step takes one more argument, the largest (loss, grad_norm) that is kept,
    float32 (2,); where they are -inf the step is held: not even the counts change, so that it can be done again.
    """
    n_devices = mesh.size
    abstract_groups = jax.eval_shape(lambda p: padded_groups(p, n_devices), abstract(config))
    specs = sharding.grouped_specs(abstract_groups, n_devices)

    def reduce_group(path, grad):
        name = sharding.group_name(path, grad)
        assert name is not None
        axis = sharding.group_axis(name, grad.shape, n_devices)
        if axis is None:
            return jax.lax.psum(grad, sharding.DATA_AXIS)
        return jax.lax.psum_scatter(grad, sharding.DATA_AXIS, scatter_dimension=axis, tiled=True)

    def local_gradients(params, inputs, targets, weights, denominator):
        """Per device: its rows of every micro-batch, one reduction at the end."""

        weights = weights / denominator  # not the sum afterwards: that would be one more pass over the head's gradient

        def micro(x, y, w):
            return jax.value_and_grad(lambda p: weighted_nll(config, p, x, y, w))(params)

        if inputs.shape[0] == 1:
            loss, grads = micro(inputs[0], targets[0], weights[0])
        else:

            def add(total, batch):
                return jax.tree.map(jnp.add, total, micro(*batch)), None

            zero = jax.tree.map(
                lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(micro, inputs[0], targets[0], weights[0])
            )
            (loss, grads), _ = jax.lax.scan(add, zero, (inputs, targets, weights))
        groups = jax.tree_util.tree_map_with_path(reduce_group, padded_groups(grads, n_devices))
        return jax.lax.psum(loss, sharding.DATA_AXIS), groups

    whole, rows = sharding.replicated_spec(), sharding.batch_spec(3)
    gradients = jax.shard_map(
        local_gradients,
        mesh=mesh,
        in_specs=(whole, rows, rows, rows, whole),
        out_specs=(whole, specs),
        check_vma=False,  # per device on purpose: with tracking, grad() would reduce in every micro-step
    )

    def update_if_kept(grads, opt_state, groups, kept, held):
        updates, new_state = optimizer.update(grads, opt_state, groups)

        def choose(new, old):
            return jnp.where(~held if jnp.issubdtype(new.dtype, jnp.integer) else kept, new, old)

        return jax.tree.map(choose, (optax.apply_updates(groups, updates), new_state), (groups, opt_state))

    opt_specs = sharding.grouped_specs(jax.eval_shape(optimizer.init, abstract_groups), n_devices)
    # per device too: whole matrices and slices of embeddings need nothing from elsewhere. Left to the partitioner, each
    # Newton-Schulz step of each shape cost an all-to-all.
    update = jax.shard_map(
        update_if_kept,
        mesh=mesh,
        in_specs=(specs, opt_specs, specs, whole, whole),
        out_specs=(specs, opt_specs),
        check_vma=False,
    )
    shardings = state_shardings(config, optimizer, mesh)
    group_shardings, replicated = sharding.named(mesh, specs), sharding.named(mesh, whole)

    def step(state: TrainState, inputs, targets, weights, limits=None):
        weights = target_weights(targets, weights)
        total_weight = weights.sum()
        denominator = jnp.where((total_weight == 0) | (not normalize), 1.0, total_weight)
        loss, grads = gradients(state.params, inputs, targets, weights, denominator)
        grads, grad_norm = clip_by_global_norm(grads, grad_clip)
        # replicated first, then cut: asked for the cut stack at once, the partitioner inserts an all-to-all per shape
        groups = jax.lax.with_sharding_constraint(padded_groups(state.params, n_devices), replicated)
        groups = jax.lax.with_sharding_constraint(groups, group_shardings)
        limits = jnp.full((2,), jnp.inf) if limits is None else limits
        kept = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= limits[0]) & (grad_norm <= limits[1])
        held = limits[0] == -jnp.inf
        groups, opt_state = update(grads, state.opt_state, groups, kept, held)
        # gathered while still stacked: one all-gather per group; slicing sharded stacks would move each matrix apart
        groups = jax.lax.with_sharding_constraint(groups, replicated)
        params = ungroup(config, unpad_stacks(config, groups))
        metrics = {"loss": loss, "grad_norm": grad_norm, "weight": total_weight, "kept": kept.astype(jnp.float32)}
        return TrainState(params, opt_state, jnp.where(held, state.step, state.step + 1)), metrics

    batch = sharding.named(mesh, rows)
    return jax.jit(
        step,
        in_shardings=(shardings, batch, batch, batch, *([sharding.named(mesh, whole)] if guarded else [])),
        out_shardings=(shardings, sharding.named(mesh, whole)),
        donate_argnums=0,
    )


# ---------------------------------------------------------------------------------------------------------------------
# device-independent form, as checkpoints store it: no padding


def abstract_state(
    config: GPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh, padded: bool = True
) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: as training holds it, or unpadded as a checkpoint stores it."""
    n_devices = mesh.size if padded else 1
    groups = jax.eval_shape(lambda p: padded_groups(p, n_devices), abstract(config))
    state = TrainState(abstract(config), jax.eval_shape(optimizer.init, groups), jax.ShapeDtypeStruct((), jnp.int32))  # pyright: ignore[reportArgumentType]
    placed = sharding.named(mesh, sharding.replicated_spec())
    where = state_shardings(config, optimizer, mesh) if padded else jax.tree.map(lambda _: placed, state)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, where)


def strip_padding(state: TrainState, target: TrainState) -> TrainState:
    """The state cut to the unpadded shapes of `target`."""
    return jax.tree.map(lambda a, t: a if a.shape == t.shape else a[tuple(slice(s) for s in t.shape)], state, target)


def restore_padding(state: TrainState, target: TrainState) -> TrainState:
    """The inverse: zero matrices added up to the shapes of `target`, placed by its shardings."""

    def pad(tree):
        def one(a, t):
            missing = [(0, want - have) for have, want in zip(a.shape, t.shape, strict=True)]
            return jnp.pad(a, missing) if missing else a

        return jax.tree.map(one, tree, target)

    # through jit also where nothing is padded: arrays as restored are not reliably donatable
    return jax.jit(pad, out_shardings=jax.tree.map(lambda t: t.sharding, target))(state)
