"""The one table of parameters: what there is, how large, how it starts, how it is sharded, trained, counted and named.

Everything that treats parameters differently reads TABLE: `init` and `abstract` here, `parallel/sharding.py` (which
mesh axis shards which dimension), `training/optim.py` (groups and stacks), `training/zero.py` (their way between
devices), `convert/` (names elsewhere), the counts of parameters and FLOPs. To add a parameter, add a row, use it in
`gpt.py`, and give an optimizer group of its own a learning rate in `optim.adamw_settings`.

The tree of parameters is a nested dict. A *path* such as "h/0/attn/c_q/kernel" names one array of it.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.model.config import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, GPTConfig

Params = dict[str, Any]
Shape = tuple[int, ...]
Init = Callable[[jax.Array, Shape, GPTConfig], jax.Array]  # (key, shape, config) -> float32 values
Naming = Literal["reference", "hugging_face"]

MATRICES = "matrices"  # the group that Muon trains; every other group is AdamW's

# Logical axes: their names are what parallel/sharding.py maps to mesh axes.
AXIS_SIZES: dict[str, Callable[[GPTConfig], int]] = {
    "vocab": lambda c: c.padded_vocab_size,
    "value_rows": lambda c: c.padded_vocab_size,
    "width": lambda c: c.n_embd,
    "heads": lambda c: c.n_head * c.head_dim,
    "kv_heads": lambda c: c.n_kv_head * c.head_dim,
    "kv_gates": lambda c: c.n_kv_head,
    "hidden": lambda c: 4 * c.n_embd,
    "layers": lambda c: c.n_layer,
}


def constant(value: float) -> Init:
    return lambda key, shape, config: jnp.full(shape, value, jnp.float32)


def normal(std: float) -> Init:
    return lambda key, shape, config: jax.random.normal(key, shape, jnp.float32) * jnp.float32(std)


def fan_in_normal(key: jax.Array, shape: Shape, config: GPTConfig) -> jax.Array:
    """N(0, s^2) with s = min(1, sqrt(out / in)) / sqrt(in), for a kernel (in, out) (arXiv:2310.17813)."""
    fan_in, fan_out = shape
    std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
    return jax.random.normal(key, shape, jnp.float32) * std


def width_uniform(factor: float) -> Init:
    """Uniform with standard deviation factor / sqrt(width)."""

    def draw(key, shape, config):
        bound = factor * math.sqrt(3.0 / config.n_embd)
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return draw


def uniform(high: float) -> Init:
    return lambda key, shape, config: jax.random.uniform(key, shape, jnp.float32, 0.0, high)


def by_layer(first: float, last: float) -> Init:
    """From `first` to `last` in equal steps; `first` where there is but one."""

    def draw(key, shape, config):
        layers = shape[0]
        values = [first + (last - first) * i / max(layers - 1, 1) for i in range(layers)]
        return jnp.array(values, jnp.float32)

    return draw


zeros = constant(0.0)


def everywhere(config: GPTConfig, layer: int | None) -> bool:
    return True


def with_part(part: str) -> Callable[[GPTConfig, int | None], bool]:
    """Where the config has a part switched on."""
    return lambda config, layer: getattr(config, part)


def with_value_embed(config: GPTConfig, layer: int | None) -> bool:
    return layer is not None and config.has_value_embed(layer)


@dataclass(frozen=True)
class Parameter:
    """One kind of parameter.

    path: where in the tree; with "{layer}", one array for every layer that `exists` accepts.
    axes: a logical axis for every dimension, which fixes its size and how it is sharded; a number is that size, never
        sharded.
    init: the distribution it is drawn from; init_modern: the one under `initialisation="modern"`, where it is another.
    group: the optimizer group: MATRICES for Muon (two dimensions, one of them sharded over tensor), any other name for
        AdamW. A group of AdamW holds one row of the table.
    use: "matmul": a kernel (in, out), which the reference stores as (out, in); "lookup": a table whose rows are chosen;
        "scale": anything else. Only "matmul" costs FLOPs worth counting.
    reference, hugging_face: its names there; "" where there is none.
    exists: (config, layer; None outside the layers) -> whether the model has it.
    """

    path: str
    axes: tuple[str | int, ...]
    init: Init
    group: str
    use: Literal["matmul", "lookup", "scale"]
    reference: str
    hugging_face: str = ""
    init_modern: Init | None = None
    exists: Callable[[GPTConfig, int | None], bool] = everywhere

    def shape(self, config: GPTConfig) -> Shape:
        return tuple(axis if isinstance(axis, int) else AXIS_SIZES[axis](config) for axis in self.axes)


def _in_block(
    part: str, hugging_face: str, axes: tuple[str | int, ...], init: Init, init_modern: Init | None = None
) -> Parameter:
    """A row for a kernel that every layer has; part is, for instance, "attn/c_q"."""
    reference = f"transformer.h.{{layer}}.{part.replace('/', '.')}.weight"
    named = f"model.layers.{{layer}}.{hugging_face}.weight"
    return Parameter(f"h/{{layer}}/{part}/kernel", axes, init, MATRICES, "matmul", reference, named, init_modern)


# Zero kernels at the end of every branch and before the logits: the first loss is exactly ln(vocab_size). The order of
# the rows within a layer is that of the matrices in the optimizer's stacks, which checkpoints hold: append new ones.
# fmt: off
TABLE: tuple[Parameter, ...] = (
    Parameter("wte/embedding", ("vocab", "width"), normal(1.0), "embedding", "lookup",
              "transformer.wte.weight", "model.embed_tokens.weight", init_modern=normal(0.8)),
    _in_block("attn/c_q",    "self_attn.q_proj", ("width", "heads"),    fan_in_normal, width_uniform(1.0)),
    _in_block("attn/c_k",    "self_attn.k_proj", ("width", "kv_heads"), fan_in_normal, width_uniform(1.0)),
    _in_block("attn/c_v",    "self_attn.v_proj", ("width", "kv_heads"), fan_in_normal, width_uniform(1.0)),
    _in_block("attn/c_proj", "self_attn.o_proj", ("heads", "width"),    zeros),
    _in_block("mlp/c_fc",    "mlp.fc1",          ("width", "hidden"),   fan_in_normal, width_uniform(0.4)),
    _in_block("mlp/c_proj",  "mlp.fc2",          ("hidden", "width"),   zeros),
    Parameter("lm_head/kernel", ("width", "vocab"), zeros, "unembedding", "matmul",
              "lm_head.weight", "lm_head.weight", init_modern=normal(0.001)),
    # parts of the modern recipe
    Parameter("h/{layer}/attn/ve_gate/kernel", (VALUE_GATE_CHANNELS, "kv_gates"), uniform(0.02), MATRICES, "matmul",
              "transformer.h.{layer}.attn.ve_gate.weight", exists=with_value_embed),
    Parameter("h/{layer}/attn/value_embed/embedding", ("value_rows", "kv_heads"), width_uniform(1.0), "value_embeds",
              "lookup", "value_embeds.{layer}.weight", exists=with_value_embed),
    Parameter("resid_lambdas", ("layers",), by_layer(1.15, 1.05), "resid_lambdas", "scale",
              "resid_lambdas", exists=with_part("resid_lambdas")),
    Parameter("x0_lambdas", ("layers",), by_layer(0.20, 0.05), "x0_lambdas", "scale",
              "x0_lambdas", exists=with_part("x0_lambdas")),
    Parameter("smear_gate/kernel", (SMEAR_CHANNELS, 1), uniform(0.02), "smear_gate", "matmul",
              "smear_gate.weight", exists=with_part("smear")),
    Parameter("smear_lambda", (1,), zeros, "smear_lambda", "scale",
              "smear_lambda", exists=with_part("smear")),
    Parameter("backout_lambda", (1,), constant(0.2), "backout_lambda", "scale",
              "backout_lambda", exists=with_part("backout")),
)
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# the table for one model


@dataclass(frozen=True)
class Leaf:
    """One array of the parameter tree: a row of the table, for one layer (None outside the layers)."""

    kind: Parameter
    layer: int | None
    shape: Shape

    @property
    def path(self) -> str:
        return self.kind.path.format(layer=self.layer)

    def name(self, naming: Naming) -> str:
        """Its name in files of the reference or of Hugging Face."""
        return getattr(self.kind, naming).format(layer=self.layer)

    @property
    def transposed(self) -> bool:
        """Whether those files hold it as (out, in), where it is (in, out) here."""
        return self.kind.use == "matmul"


def leaves(config: GPTConfig) -> tuple[Leaf, ...]:
    """All arrays of a model, those of the layers by layer, each in the order of the table."""
    return _leaves(config, TABLE)


@functools.lru_cache(maxsize=32)
def _leaves(config: GPTConfig, table: tuple[Parameter, ...]) -> tuple[Leaf, ...]:
    found = []
    for layer in (None, *range(config.n_layer)):
        rows = [kind for kind in table if ("{layer}" in kind.path) == (layer is not None)]
        found += [Leaf(kind, layer, kind.shape(config)) for kind in rows if kind.exists(config, layer)]
    return tuple(found)


def shape_of(config: GPTConfig, path: str) -> Shape:
    """The shape of the array at a path. Raises KeyError where the model has none."""
    return _shapes(config, TABLE)[path]


@functools.lru_cache(maxsize=32)
def _shapes(config: GPTConfig, table: tuple[Parameter, ...]) -> dict[str, Shape]:
    return {leaf.path: leaf.shape for leaf in _leaves(config, table)}


def nested(values: Iterable[tuple[str, Any]]) -> Params:
    """The tree of (path, value) pairs."""
    tree: Params = {}
    for path, value in values:
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree


def flat(config: GPTConfig, tree: Params) -> dict[str, Any]:
    """The values of a parameter tree by path, in the tree's order. Raises ValueError naming paths that the model lacks
    or misses."""
    values = {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}
    expected = _shapes(config, TABLE)
    if values.keys() != expected.keys():
        missing, unexpected = sorted(expected.keys() - values.keys()), sorted(values.keys() - expected.keys())
        raise ValueError(f"not the parameters of this model: missing {missing}, unexpected {unexpected}")
    return values


def path_name(path) -> str:
    """ "h/0/attn/c_q/kernel" for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_leaves(config: GPTConfig, function: Callable[[Leaf], Any]) -> Params:
    """A tree like the parameters of function(leaf)."""
    return nested((leaf.path, function(leaf)) for leaf in leaves(config))


def abstract(config: GPTConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves, without allocating anything."""
    return map_leaves(config, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32))


def init(config: GPTConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters, each drawn as its row of the table says (reference behaviour).

    An array's key is `key` folded with its index in the flattened tree: the same key gives the same values in every
    release.
    """
    order: list[Leaf] = jax.tree.leaves(map_leaves(config, lambda leaf: leaf))
    alike: dict[tuple[Init, Shape], list[int]] = defaultdict(list)
    for index, leaf in enumerate(order):
        modern = leaf.kind.init_modern if config.initialisation == "modern" else None
        alike[modern or leaf.kind.init, leaf.shape].append(index)
    values: dict[str, jax.Array] = {}
    # one random program for all arrays of one shape and distribution: a d20 init compiles in 1 s instead of 5
    for (draw, shape), indices in alike.items():
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.array(indices))
        drawn = jax.vmap(lambda one, draw=draw, shape=shape: draw(one, shape, config))(keys)
        values.update((order[index].path, drawn[row]) for row, index in enumerate(indices))
    return nested(values.items())


# ---------------------------------------------------------------------------------------------------------------------
# counts


def num_params(config: GPTConfig) -> int:
    """All parameters, embeddings included."""
    return sum(num_params_by_group(config).values())


def num_params_by_group(config: GPTConfig) -> dict[str, int]:
    """The parameters of every optimizer group."""
    counts: dict[str, int] = defaultdict(int)
    for leaf in leaves(config):
        counts[leaf.kind.group] += math.prod(leaf.shape)
    return dict(counts)


def num_scaling_params(config: GPTConfig) -> int:
    """Those that the modern recipe derives its horizon from: all matrices of the layers, and lm_head."""
    counts = num_params_by_group(config)
    return counts[MATRICES] + counts["unembedding"]


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs per token: 6 for every weight of a product, and 12 H D for every key that a query of a full
    sequence's end sees (reference formula)."""
    weights = sum(math.prod(leaf.shape) for leaf in leaves(config) if leaf.kind.use == "matmul")
    keys = sum(config.sequence_len if w is None else min(w, config.sequence_len) for w in config.windows)
    return 6 * weights + 12 * config.n_embd * keys
