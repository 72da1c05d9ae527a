"""Which parameter is trained how: groups, the combined optimizer, gradient clipping.

The optimizer sees the parameters regrouped by *treatment* instead of by layer: two embeddings for AdamW and one stack
per matrix shape for Muon. Stacks make Newton-Schulz one batched matmul per shape, and sharding a stack over its leading
axis makes the whole optimizer step free of communication.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.model.gpt import GPTConfig, Params, abstract
from nanochat_jax.training import schedules
from nanochat_jax.training.muon import MuonState, muon
from nanochat_jax.utils.errors import InputError

Groups = dict[str, Any]

# Order of a block's matrices inside the stacks, after the layer's number. Fixed, since checkpoints hold stacks.
BLOCK_ORDER = ("attn/c_q", "attn/c_k", "attn/c_v", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
REFERENCE_WIDTH = 768  # the width at which the AdamW learning rates below were tuned


@dataclass(frozen=True)
class OptimHyper:
    """Hyperparameters of every stage; the defaults are the reference's pretraining.

    Learning rates are those at width 768: the two AdamW rates are multiplied by (n_embd / 768) ** -0.5, Muon's is not.
    All three are multiplied by `init_lr_frac` (0.02 in finetuning, 0.05 in reinforcement learning) and by the schedule.
    `weight_decay` is decoupled and applies to the AdamW groups. `momentum_warmup` steps lead Muon's momentum from
    `momentum_start` to `momentum`; 0 keeps it at `momentum`. `ns_dtype` "auto" is bfloat16 on accelerators.
    """

    embedding_lr: float = 0.2
    unembedding_lr: float = 0.004
    matrix_lr: float = 0.02
    weight_decay: float = 0.0
    init_lr_frac: float = 1.0
    warmup_ratio: float = 0.0
    warmdown_ratio: float = 0.2
    final_lr_frac: float = 0.0
    adam_b1: float = 0.8
    adam_b2: float = 0.95
    adam_eps: float = 1e-10
    momentum: float = 0.95
    momentum_start: float = 0.85
    momentum_warmup: int = 300
    ns_steps: int = 5
    ns_dtype: str = "auto"

    def __post_init__(self):
        if self.ns_dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"ns_dtype must be auto, float32 or bfloat16, got {self.ns_dtype!r}")
        for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "weight_decay", "init_lr_frac"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("adam_b1", "adam_b2", "momentum", "momentum_start"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie in 0..1 (1 excluded), got {getattr(self, name)}")


class OptimState(NamedTuple):
    """Arrays only. `adam` covers {"embedding", "unembedding"}, `muon` the stacks; both count the updates done."""

    adam: optax.ScaleByAdamState
    muon: MuonState


# ---------------------------------------------------------------------------------------------------------------------
# regrouping


def _matrix_paths(blocks: Params) -> list[tuple[str, str, str]]:
    """(layer, part, name) of every kernel under params["h"], layers in numeric order, names in BLOCK_ORDER."""
    expected = [tuple(name.split("/")) for name in BLOCK_ORDER]
    paths = []
    for layer in sorted(blocks, key=int):
        found = {(part, name) for part in blocks[layer] for name in blocks[layer][part]}
        if found != set(expected):
            raise ValueError(f"block h/{layer} must hold exactly {BLOCK_ORDER}, found {sorted(map('/'.join, found))}")
        paths += [(layer, part, name) for part, name in expected]
    return paths


def _stack_name(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]}"


def group(params: Params, like: Params | None = None) -> Groups:
    """Parameters (or gradients, or moments) of the model's tree, by treatment:

    {"embedding": (V, C), "unembedding": (C, V), "matrices": {"256x1024": (n, in, out), ...}}. A stack holds all block
    kernels of one (in, out) shape, ordered by layer, then by BLOCK_ORDER. Pure; runs under jit and `jax.eval_shape`.
    Where `params` holds only parts of matrices, `like` is the same tree with the whole shapes, which name the stacks.
    Raises ValueError for a block with missing or unknown matrices.
    """
    shapes = params if like is None else like
    stacks: dict[str, list[jax.Array]] = {}
    for layer, part, name in _matrix_paths(params["h"]):
        stack = _stack_name(shapes["h"][layer][part][name]["kernel"].shape)
        stacks.setdefault(stack, []).append(params["h"][layer][part][name]["kernel"])
    return {
        "embedding": params["wte"]["embedding"],
        "unembedding": params["lm_head"]["kernel"],
        "matrices": {shape: jnp.stack(kernels) for shape, kernels in stacks.items()},
    }


def ungroup(config: GPTConfig, groups: Groups) -> Params:
    """The inverse of `group`; padding at the end of a stack is ignored."""
    shapes = abstract(config)
    taken: dict[str, int] = {}
    blocks: Params = {}
    for layer, part, name in _matrix_paths(shapes["h"]):
        stack = _stack_name(shapes["h"][layer][part][name]["kernel"].shape)
        index = taken.get(stack, 0)
        taken[stack] = index + 1
        blocks.setdefault(layer, {}).setdefault(part, {})[name] = {"kernel": groups["matrices"][stack][index]}
    return {
        "wte": {"embedding": groups["embedding"]},
        "h": blocks,
        "lm_head": {"kernel": groups["unembedding"]},
    }


def stack_members(config: GPTConfig) -> dict[str, list[str]]:
    """The paths of every stack's matrices, in order: {"256x1024": ["h/0/mlp/c_fc/kernel", "h/1/mlp/c_fc/kernel"]}."""
    shapes = abstract(config)["h"]
    members: dict[str, list[str]] = {}
    for layer, part, name in _matrix_paths(shapes):
        stack = _stack_name(shapes[layer][part][name]["kernel"].shape)
        members.setdefault(stack, []).append(f"h/{layer}/{part}/{name}/kernel")
    return members


def pad_stacks(groups: Groups, multiple: int) -> Groups:
    """Stacks padded with zero matrices to a multiple (the device count); Muon keeps zero matrices zero."""
    if multiple < 1:
        raise ValueError(f"stacks are padded to a multiple of the device count, which must be >= 1, got {multiple}")
    pad = {k: jnp.pad(s, ((0, -s.shape[0] % multiple), (0, 0), (0, 0))) for k, s in groups["matrices"].items()}
    return {**groups, "matrices": pad}


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer


def width_scale(n_embd: int) -> float:
    """(n_embd / 768) ** -0.5, the factor on both AdamW learning rates (reference behaviour)."""
    return (n_embd / REFERENCE_WIDTH) ** -0.5


def initial_learning_rates(hyper: OptimHyper, n_embd: int) -> dict[str, float]:
    """Learning rate of each group before the schedule: keys "embedding", "unembedding", "matrices"."""
    scale = width_scale(n_embd) * hyper.init_lr_frac
    return {
        "embedding": hyper.embedding_lr * scale,
        "unembedding": hyper.unembedding_lr * scale,
        "matrices": hyper.matrix_lr * hyper.init_lr_frac,
    }


def lr_schedule(hyper: OptimHyper, schedule: int | schedules.Schedule) -> schedules.Schedule:
    """The multiplier as a function of the step: a number of iterations means pretraining's warm-up and warm-down."""
    if callable(schedule):
        return schedule
    return schedules.warmup_warmdown(schedule, hyper.warmup_ratio, hyper.warmdown_ratio, hyper.final_lr_frac)


def momentum_schedule(hyper: OptimHyper) -> schedules.Schedule:
    """Muon's momentum as a function of the step."""
    return schedules.momentum_warmup(hyper.momentum_warmup, hyper.momentum_start, hyper.momentum)


def make_optimizer(hyper: OptimHyper, schedule: int | schedules.Schedule, n_embd: int) -> optax.GradientTransformation:
    """AdamW for both embeddings and Muon for the matrices, over the tree that `group` (and `pad_stacks`) returns.

    schedule: the number of iterations (then warm-up and warm-down come from `hyper`) or a multiplier as a function of
    the step. Everything that changes over time is a function of the counts in the state, so a restored state goes on
    exactly where it stopped. `update` needs the embeddings for their decay: update(grads, state, groups).
    """
    multiplier = lr_schedule(hyper, schedule)
    rates = initial_learning_rates(hyper, n_embd)
    adam = optax.scale_by_adam(hyper.adam_b1, hyper.adam_b2, hyper.adam_eps, mu_dtype=jnp.float32)
    matrices = muon(
        lambda count: rates["matrices"] * multiplier(count),
        momentum_schedule(hyper),
        ns_steps=hyper.ns_steps,
        ns_dtype=None if hyper.ns_dtype == "auto" else hyper.ns_dtype,
        kernel_layout="in_out",
    )

    def init(groups: Groups) -> OptimState:
        adam_state: Any = adam.init(_embeddings(groups))
        muon_state: Any = matrices.init(groups["matrices"])
        return OptimState(adam=adam_state, muon=muon_state)

    def update(grads: Groups, state: OptimState, groups: Groups | None = None):
        if groups is None:
            raise ValueError("the optimizer needs the parameters: call update(grads, state, groups)")
        factor = jnp.asarray(multiplier(state.adam.count), jnp.float32)
        direction: Any
        adam_state: Any
        muon_state: Any
        direction, adam_state = adam.update(_embeddings(grads), state.adam)
        updates: Groups = {}
        for name, step in direction.items():
            if hyper.weight_decay:
                step = step + hyper.weight_decay * groups[name]
            updates[name] = -(rates[name] * factor) * step
        updates["matrices"], muon_state = matrices.update(grads["matrices"], state.muon)
        return updates, OptimState(adam=adam_state, muon=muon_state)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _embeddings(groups: Groups) -> Groups:
    return {"embedding": groups["embedding"], "unembedding": groups["unembedding"]}


# ---------------------------------------------------------------------------------------------------------------------
# clipping


def global_norm(tree: Any, axes: tuple[str, ...] = ()) -> jax.Array:
    """sqrt of the sum of squares over all leaves, float32 scalar; `axes`: mesh axes over which each leaf is cut, inside
    `jax.shard_map`."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(jax.lax.psum(functools.reduce(jnp.add, squares), axes))


def clip_by_global_norm(grads: Any, max_norm: float, axes: tuple[str, ...] = ()) -> tuple[Any, jax.Array]:
    """(gradients scaled by min(1, max_norm / (norm + 1e-6)), norm before clipping). max_norm <= 0 leaves them alone.

    Works on any tree, grouped or not, padded or not, and under automatic sharding (the norm is then global); `axes` as
    in `global_norm`. The 1e-6 is the reference's. A non-finite norm makes non-finite gradients: the caller sees it in
    the returned norm.
    """
    norm = global_norm(grads, axes)
    if max_norm <= 0:
        return grads, norm
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), norm
