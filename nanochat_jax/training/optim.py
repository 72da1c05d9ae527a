"""How parameters are trained: the optimizer groups, the combined optimizer, gradient clipping.

The optimizer sees the parameters regrouped by *treatment* instead of by layer: the groups that the table of parameters
names for AdamW (embeddings, scalars) and, for Muon, one stack per matrix shape. Stacks make Newton-Schulz one batched
matmul per shape, and sharding a stack over its leading axis makes the optimizer step free of communication.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.model import parameters
from nanochat_jax.model.config import RECIPES, GPTConfig
from nanochat_jax.model.parameters import MATRICES, Leaf, Params, map_leaves
from nanochat_jax.training import schedules
from nanochat_jax.training.muon import MuonState, aspect_scale, decay, muon
from nanochat_jax.utils.errors import InputError

Groups = dict[str, Any]

REFERENCE_WIDTH = 768  # the width at which the AdamW learning rates below were tuned

GRAD_CLIP = {"v1": 1.0, "modern": 0.0}  # largest global gradient norm in pretraining; 0: no clipping

MUON_PARTS = ("muon_eq", "polar_express", "muon_plus", "normuon", "cautious")  # switches of `muon`

# The optimizer of the modern recipe (the reference of July 2026), where it is not v1's (October 2025).
MODERN: dict[str, Any] = dict(
    recipe="modern",
    embedding_lr=0.3,
    unembedding_lr=0.008,
    weight_decay=0.28,
    warmup_steps=40,
    warmdown_ratio=0.65,
    final_lr_frac=0.05,
    momentum=0.97,
    momentum_warmup=400,
    momentum_final=0.90,
    **dict.fromkeys(MUON_PARTS, True),
)


@dataclass(frozen=True)
class OptimHyper:
    """Hyperparameters of every stage; the defaults are v1's pretraining, `OptimHyper.of("modern")` the modern recipe's.

    recipe: "v1" or "modern": the AdamW groups (`adamw_settings`), and what is decayed by `weight_decay` (decoupled):
        in v1 the AdamW groups; in modern the matrices, along a cosine to 0, while those have numbers of their own.
    embedding_lr, unembedding_lr: at width 768: multiplied by (n_embd / 768) ** -0.5. matrix_lr (Muon's) and scalar_lr
        (of the residual and x0 scalars) are not.
    init_lr_frac: factor on all learning rates (0.02 in finetuning, 0.05 in reinforcement learning), like the schedule:
        warm-up over `warmup_steps`, or `warmup_ratio` of the steps where that is 0, and warm-down.
    momentum: Muon's; `momentum_warmup` steps lead to it from `momentum_start` (0 steps: it is always `momentum`), and
        `momentum_final`, if any, is where it ends with the warm-down of the learning rate.
    ns_dtype: "auto" is bfloat16 on accelerators.
    muon_eq, polar_express, muon_plus, normuon, cautious: parts of Muon, see `muon`.
    """

    recipe: str = "v1"
    embedding_lr: float = 0.2
    unembedding_lr: float = 0.004
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    weight_decay: float = 0.0
    init_lr_frac: float = 1.0
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    warmdown_ratio: float = 0.2
    final_lr_frac: float = 0.0
    momentum: float = 0.95
    momentum_start: float = 0.85
    momentum_warmup: int = 300
    momentum_final: float | None = None
    ns_steps: int = 5
    ns_dtype: str = "auto"
    muon_eq: bool = False
    polar_express: bool = False
    muon_plus: bool = False
    normuon: bool = False
    cautious: bool = False

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise InputError(f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        if self.ns_dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"ns_dtype must be auto, float32 or bfloat16, got {self.ns_dtype!r}")
        for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay", "init_lr_frac"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("momentum", "momentum_start", "momentum_final"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise InputError(f"{name} must lie in 0..1 (1 excluded), got {value}")

    @classmethod
    def of(cls, recipe: str, **overrides: Any) -> "OptimHyper":
        """The pretraining of a recipe, but for the overrides. Raises InputError for another name."""
        return cls(**{"recipe": recipe, **(MODERN if recipe == "modern" else {}), **overrides})


class OptimState(NamedTuple):
    """Arrays only. `adam` covers the groups of AdamW, `muon` the stacks; both count the updates done."""

    adam: optax.ScaleByAdamState
    muon: MuonState


@dataclass(frozen=True)
class Optimizer:
    """A transformation as optax has it, over grouped trees, but for the decay of the matrices, which is added later.

    init: groups -> OptimState. update: (gradients, state, groups; those of AdamW are enough) -> (updates, state).
    decay_matrices: (config, updates, parameters, updates done before, factor) -> updates in the model's tree, matrices
        with their weight decay. It needs each parameter beside its update, which are only together after the gathering:
        parameters are never sharded as stacks.
    normuon: the state has second moments of Muon's.
    """

    init: Callable[[Groups], OptimState]
    update: Callable[..., tuple[Groups, OptimState]]
    decay_matrices: Callable[[GPTConfig, Params, Params, Any, Any], Params]
    normuon: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# regrouping


def stack_name(leaf: Leaf) -> str:
    """The stack that holds a matrix of Muon's: "256x1024" for kernels (256, 1024)."""
    return f"{leaf.shape[0]}x{leaf.shape[1]}"


def stack_members(config: GPTConfig) -> dict[str, list[Leaf]]:
    """The matrices of every stack in order: by layer, then as in the table of parameters."""
    members: dict[str, list[Leaf]] = defaultdict(list)
    for leaf in parameters.leaves(config):
        if leaf.kind.group == MATRICES:
            members[stack_name(leaf)].append(leaf)
    return dict(members)


def adamw_members(config: GPTConfig) -> dict[str, Any]:
    """The arrays of every other group: one, or {"0": ..., "1": ...} by layer where the row is one of the layers."""
    groups: dict[str, Any] = {}
    for leaf in parameters.leaves(config):
        if leaf.kind.group == MATRICES:
            continue
        if leaf.layer is None:
            groups[leaf.kind.group] = leaf
        else:
            groups.setdefault(leaf.kind.group, {})[str(leaf.layer)] = leaf
    return groups


def group(config: GPTConfig, params: Params) -> Groups:
    """Parameters (or gradients, or moments) of the model's tree, by treatment:

    {"embedding": (V, C), "unembedding": (C, V), "matrices": {"256x1024": (n, in, out), ...}}. A stack holds all kernels
    of one (in, out) shape, as `stack_members` orders them; where `params` holds shards of matrices, stacks have the
    names of the full shapes. Pure; runs under jit and `jax.eval_shape`. Raises ValueError for missing or unknown paths.
    """
    values = parameters.flat(config, params)
    groups = jax.tree.map(lambda leaf: values[leaf.path], adamw_members(config))
    stacks = {name: [values[leaf.path] for leaf in stack] for name, stack in stack_members(config).items()}
    return {**groups, MATRICES: {name: jnp.stack(kernels) for name, kernels in stacks.items()}}


def ungroup(config: GPTConfig, groups: Groups) -> Params:
    """The inverse of `group`; padding at the end of a stack is ignored."""
    values: dict[str, Any] = {}
    taken: dict[str, int] = defaultdict(int)
    for leaf in parameters.leaves(config):
        if leaf.kind.group == MATRICES:
            name = stack_name(leaf)
            values[leaf.path] = groups[MATRICES][name][taken[name]]
            taken[name] += 1
    members = adamw_members(config)
    adamw = {name: groups[name] for name in members}
    jax.tree.map(lambda leaf, value: values.update({leaf.path: value}), members, adamw)
    return parameters.nested(values.items())


def pad_stacks(groups: Groups, multiple: int) -> Groups:
    """Stacks padded with zero matrices to a multiple (the device count); Muon keeps zero matrices zero."""
    if multiple < 1:
        raise ValueError(f"stacks are padded to a multiple of the device count, which must be >= 1, got {multiple}")
    pad = {k: jnp.pad(s, ((0, -s.shape[0] % multiple), (0, 0), (0, 0))) for k, s in groups[MATRICES].items()}
    return {**groups, MATRICES: pad}


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer


def width_scale(n_embd: int) -> float:
    """(n_embd / 768) ** -0.5, the factor on both AdamW learning rates (reference behaviour)."""
    return (n_embd / REFERENCE_WIDTH) ** -0.5


@dataclass(frozen=True)
class AdamWSettings:
    """Of one group: learning rate before `init_lr_frac` and the schedule, at width 768 if `by_width`, decays of both
    moments, epsilon, decoupled weight decay."""

    lr: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    by_width: bool = True


def adamw_settings(hyper: OptimHyper) -> dict[str, AdamWSettings]:
    """The settings of every AdamW group that the table of parameters names: one row each (reference behaviour)."""
    embedding, unembedding, scalar = hyper.embedding_lr, hyper.unembedding_lr, hyper.scalar_lr
    smear = AdamWSettings(0.2, 0.8, 0.95, 1e-10, 0.0, by_width=False)  # a fixed rate
    groups = {
        "unembedding": AdamWSettings(unembedding, 0.8, 0.96, 1e-10, 0.01),
        "embedding": AdamWSettings(embedding, 0.8, 0.995, 1e-10, 0.001),
        "value_embeds": AdamWSettings(0.5 * embedding, 0.8, 0.995, 1e-10, 0.01),
        "resid_lambdas": AdamWSettings(0.01 * scalar, 0.8, 0.95, 1e-10, 0.05, by_width=False),
        "x0_lambdas": AdamWSettings(scalar, 0.96, 0.95, 1e-10, 0.0, by_width=False),
        "smear_gate": smear,
        "smear_lambda": smear,
        "backout_lambda": smear,
    }
    if hyper.recipe == "v1":
        shared = 0.8, 0.95, 1e-10, hyper.weight_decay
        groups["embedding"] = AdamWSettings(embedding, *shared)
        groups["unembedding"] = AdamWSettings(unembedding, *shared)
    return groups


def initial_learning_rates(hyper: OptimHyper, n_embd: int) -> dict[str, float]:
    """Learning rate of each group before the schedule: those of AdamW by name, and "matrices"."""
    scale = width_scale(n_embd) * hyper.init_lr_frac
    groups = adamw_settings(hyper).items()
    rates = {name: one.lr * (scale if one.by_width else hyper.init_lr_frac) for name, one in groups}
    return {**rates, MATRICES: hyper.matrix_lr * hyper.init_lr_frac}


def lr_schedule(hyper: OptimHyper, schedule: int | schedules.Schedule) -> schedules.Schedule:
    """The multiplier as a function of the step: a number of iterations means pretraining's warm-up and warm-down."""
    if callable(schedule):
        return schedule
    lengths = hyper.warmup_ratio, hyper.warmdown_ratio, hyper.final_lr_frac, hyper.warmup_steps
    return schedules.warmup_warmdown(schedule, *lengths)


def momentum_schedule(hyper: OptimHyper, num_iterations: int | None = None) -> schedules.Schedule:
    """Muon's momentum as a function of the step. Raises ValueError where a warm-down is wanted of an unknown length."""
    rise = hyper.momentum_warmup, hyper.momentum_start, hyper.momentum
    if hyper.momentum_final is None:
        return schedules.momentum_warmup(*rise)
    n = _known(num_iterations, "momentum_final")
    return schedules.momentum_warmup_warmdown(n, hyper.warmdown_ratio, *rise, hyper.momentum_final)


def matrix_decay_schedule(hyper: OptimHyper, num_iterations: int | None = None) -> schedules.Schedule | None:
    """The weight decay of the matrices as a function of the step; None if they are not decayed. ValueError likewise."""
    if hyper.recipe == "v1" or not hyper.weight_decay:
        return None
    multiplier = schedules.cosine_to_zero(_known(num_iterations, "weight_decay"))
    return lambda step: hyper.weight_decay * multiplier(step)


def _known(num_iterations: int | None, name: str) -> int:
    if num_iterations is None:
        raise ValueError(f"{name} follows a schedule, which needs the number of iterations")
    return num_iterations


def make_optimizer(
    hyper: OptimHyper, schedule: int | schedules.Schedule, n_embd: int, num_iterations: int | None = None
) -> Optimizer:
    """AdamW for embeddings and scalars and Muon for the matrices, over the tree of `group` (and `pad_stacks`).

    schedule: the number of iterations (then warm-up and warm-down come from `hyper`) or a multiplier as a function of
    the step; with the latter, `num_iterations` is for what else changes over the run. Everything that changes over time
    is a function of the counts in the state, so a restored state resumes exactly where it stopped. `update` needs the
    AdamW groups for their decay: update(grads, state, groups). The state is an OptimState, see `like_groups`.
    """
    n = num_iterations if callable(schedule) else schedule
    multiplier = lr_schedule(hyper, schedule)
    matrix_decay = matrix_decay_schedule(hyper, n)
    rates, settings = initial_learning_rates(hyper, n_embd), adamw_settings(hyper)
    alike: dict[tuple[float, float, float], list[str]] = defaultdict(list)  # groups updated together
    for name, one in settings.items():
        alike[one.b1, one.b2, one.eps].append(name)
    parts = {name: getattr(hyper, name) for name in MUON_PARTS}
    matrices = muon(
        lambda count: rates[MATRICES] * multiplier(count),
        momentum_schedule(hyper, n),
        ns_steps=hyper.ns_steps,
        ns_dtype=None if hyper.ns_dtype == "auto" else hyper.ns_dtype,
        kernel_layout="in_out",
        **parts,
    )

    def init(groups: Groups) -> OptimState:
        def moments() -> Groups:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), _of_adamw(groups))

        muon_state: Any = matrices.init(groups[MATRICES])
        return OptimState(optax.ScaleByAdamState(jnp.zeros((), jnp.int32), moments(), moments()), muon_state)

    def update(grads: Groups, state: OptimState, groups: Groups | None = None):
        if groups is None:
            raise ValueError("the optimizer needs the parameters: call update(grads, state, groups)")
        # not Adam's count, which goes on where a stage inherits moments (`pipeline._with_moments`)
        factor = jnp.asarray(multiplier(state.muon.count), jnp.float32)
        direction, adam_state = _adam_direction(alike, _of_adamw(grads), state.adam)
        updates: Groups = {}
        for name, step in direction.items():
            if decay := settings[name].weight_decay:
                step = jax.tree.map(lambda d, p, decay=decay: d + decay * p, step, groups[name])
            updates[name] = jax.tree.map(lambda d, rate=rates[name]: -(rate * factor) * d, step)
        muon_state: Any
        updates[MATRICES], muon_state = matrices.update(grads[MATRICES], state.muon)
        return updates, OptimState(adam_state, muon_state)

    def decay_matrices(config: GPTConfig, updates: Params, params: Params, count: Any, factor: Any = 1.0) -> Params:
        if matrix_decay is None:
            return updates
        rate = rates[MATRICES] * multiplier(count) * matrix_decay(count) * factor

        def one(leaf: Leaf, update, param):
            if leaf.kind.group != MATRICES:
                return update
            return decay(update, param, rate, aspect_scale(*leaf.shape), hyper.cautious)

        return jax.tree.map(one, map_leaves(config, lambda leaf: leaf), updates, params)

    return Optimizer(init, update, decay_matrices, hyper.normuon)


def _adam_direction(
    alike: dict[tuple[float, float, float], list[str]], grads: Groups, state: optax.ScaleByAdamState
) -> tuple[Groups, optax.ScaleByAdamState]:
    """(Adam's direction, new state). alike: (b1, b2, eps) -> the groups that they are for."""
    direction: Any = {}
    mu: Any = {}
    nu: Any = {}
    count: Any = state.count
    for (b1, b2, eps), names in alike.items():
        trees: Any = grads, state.mu, state.nu
        mine, old_mu, old_nu = ({n: tree[n] for n in names if n in tree} for tree in trees)
        transform = optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32)
        done: Any
        new: Any
        done, new = transform.update(mine, optax.ScaleByAdamState(state.count, old_mu, old_nu))
        direction, mu, nu, count = direction | done, mu | new.mu, nu | new.nu, new.count
    return direction, optax.ScaleByAdamState(count, mu, nu)


def like_groups(groups: Groups, count: Any, normuon: bool = False) -> OptimState:
    """What belongs to each array of an optimizer state, given what belongs to the groups' arrays and to a count.

    normuon: the state has Muon's second moments, which go with their stacks."""
    adamw: Any = _of_adamw(groups)
    stacks = groups[MATRICES]
    return OptimState(
        optax.ScaleByAdamState(count, adamw, adamw), MuonState(count, stacks, stacks if normuon else None)
    )


def _of_adamw(groups: Groups) -> Groups:
    return {name: value for name, value in groups.items() if name != MATRICES}


# ---------------------------------------------------------------------------------------------------------------------
# clipping


def global_norm(tree: Any, axes: tuple[str, ...] = (), replicas: Any = None) -> jax.Array:
    """sqrt of the sum of squares over all leaves, float32 scalar.

    axes: inside `jax.shard_map`, the mesh axes over which the leaves are sharded; replicas: a tree of numbers, on how
    many of these devices each entry of a leaf lives (default: 1).
    """
    squares = jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf.astype(jnp.float32))), tree)
    if replicas is not None:
        squares = jax.tree.map(lambda square, n: square if n == 1 else square / n, squares, replicas)
    return jnp.sqrt(jax.lax.psum(functools.reduce(jnp.add, jax.tree.leaves(squares)), axes))


def clip_by_global_norm(
    grads: Any, max_norm: float, axes: tuple[str, ...] = (), replicas: Any = None
) -> tuple[Any, jax.Array]:
    """(gradients scaled by min(1, max_norm / (norm + 1e-6)), norm before clipping). max_norm <= 0 leaves them alone.

    Works on any tree, grouped or not, padded or not, and under automatic sharding (the norm is then global); `axes` and
    `replicas` as in `global_norm`. The 1e-6 is the reference's. A non-finite norm makes non-finite gradients: the
    caller sees it in the returned norm.
    """
    norm = global_norm(grads, axes, replicas)
    if max_norm <= 0:
        return grads, norm
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), norm
