"""The table of parameters: it is the model's, and a new parameter is one row of it."""

import dataclasses
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nanochat_jax.convert.params_reference import params_from_reference, params_to_reference
from nanochat_jax.model import gpt, parameters
from nanochat_jax.model.config import MODERN, GPTConfig
from nanochat_jax.model.parameters import MATRICES
from nanochat_jax.parallel import sharding
from nanochat_jax.parallel.sharding import AXES, TENSOR
from nanochat_jax.training import optim, zero
from tests.toy_params import toy_params

CONFIG = GPTConfig(sequence_len=8, vocab_size=64, n_layer=12, n_head=4, n_kv_head=2, n_embd=32)


@pytest.mark.parametrize("parts", [{}, MODERN], ids=["v1", "modern"])
def test_the_table_is_what_the_modules_use(parts):
    config = dataclasses.replace(CONFIG, **parts)
    state = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: gpt.GPT(config)))[1])
    described = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert described == jax.tree.map(lambda a: (a.shape, a.dtype), parameters.abstract(config))


def test_rows_keep_the_rules_of_their_group():
    groups = Counter(kind.group for kind in parameters.TABLE)
    for kind in parameters.TABLE:
        if kind.group == MATRICES:
            assert len(kind.axes) == 2 and sharding.dimension(kind, TENSOR) is not None, kind.path
        else:
            assert groups[kind.group] == 1, f"{kind.group} has several rows"
    assert set(optim.adamw_settings(optim.OptimHyper())) == groups.keys() - {MATRICES}


def test_names_elsewhere():
    names = {leaf.path: (leaf.name("reference"), leaf.name("hugging_face")) for leaf in parameters.leaves(CONFIG)}
    assert names["h/11/mlp/c_proj/kernel"] == ("transformer.h.11.mlp.c_proj.weight", "model.layers.11.mlp.fc2.weight")
    assert names["wte/embedding"] == ("transformer.wte.weight", "model.embed_tokens.weight")
    assert names["lm_head/kernel"] == ("lm_head.weight",) * 2
    assert len({name for pair in names.values() for name in pair}) == 2 * len(names) - 1


def test_a_tree_of_another_model_is_refused():
    params = toy_params(dataclasses.replace(CONFIG, n_layer=1))
    with pytest.raises(ValueError, match="missing .*h/11/attn/c_q/kernel"):
        parameters.flat(CONFIG, params)


# ---------------------------------------------------------------------------------------------------------------------
# the rows of the modern recipe, of all kinds


def test_the_kinds_of_rows_are_counted_drawn_and_named():
    config = dataclasses.replace(CONFIG, n_layer=3, **MODERN)
    params = parameters.init(config, jax.random.key(0))
    assert {layer for layer, block in params["h"].items() if "value_embed" in block["attn"]} == {"0", "2"}
    np.testing.assert_allclose(params["resid_lambdas"], [1.15, 1.10, 1.05], rtol=1e-6)
    assert 0 < params["smear_gate"]["kernel"].max() < 0.02
    named = params_to_reference(config, params)
    assert named["transformer.h.2.attn.ve_gate.weight"].shape == (2, 12) and named["smear_gate.weight"].shape == (1, 24)
    jax.tree.map(np.testing.assert_array_equal, params_from_reference(config, named), params)


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["sharded", "full"])
def test_all_rows_travel_and_are_trained_on_a_mesh(kv_heads):
    """Gradients scattered, clipped, taken by the optimizer and gathered on 2 x 2 x 2 devices, as on one."""
    config = dataclasses.replace(CONFIG, n_layer=2, n_kv_head=kv_heads, **MODERN)
    mesh = sharding.make_mesh(jax.devices()[:8], fsdp=2, tensor=2)
    optimizer = optim.make_optimizer(optim.OptimHyper(weight_decay=0.1), lambda t: 1.0, config.n_embd)
    params, grads = toy_params(config, 1), toy_params(config, 2)

    def alone(params, grads):
        groups = optim.group(config, params)
        clipped, norm = optim.clip_by_global_norm(optim.group(config, grads), 1.0)
        updates, _ = optimizer.update(clipped, optimizer.init(groups), groups)
        trained: Any = optax.apply_updates(groups, updates)
        return optim.ungroup(config, trained), norm

    def per_device(params, grads, state):
        moves = zero.Zero(config, mesh)
        share = (1 + jax.lax.axis_index(sharding.ROW_AXES)) / 10  # 1 + 2 + 3 + 4 tenths
        of_tensor = (1 + 2 * jax.lax.axis_index(TENSOR)) / 4

        def mine(leaf):  # what this device's rows (and heads) add to the gradient
            gradient = share * at(grads, leaf.path)
            return of_tensor * gradient if sharding.sums_over_tensor(config, mesh, leaf.kind) else gradient

        scattered = moves.scatter_gradients(parameters.map_leaves(config, mine))
        replicas = zero.group_replicas(config, mesh)
        scattered, norm = optim.clip_by_global_norm(scattered, 1.0, AXES, replicas)
        updates: Any
        updates, _ = optimizer.update(scattered, state, moves.adamw_slices(params))
        return jax.tree.map(jnp.add, params, moves.gather_updates(updates)), norm

    stored = sharding.parameter_specs(config, mesh)
    full_over_fsdp = parameters.map_leaves(
        config, lambda leaf: jax.P(*[a if a == TENSOR else None for a in sharding.mesh_axes(config, mesh, leaf.kind)])
    )
    state = optim.like_groups(zero.group_specs(config, mesh), jax.P())
    step = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(stored, full_over_fsdp, state),
        out_specs=(stored, jax.P()),
        check_vma=False,
    )
    fresh = optimizer.init(zero.padded_groups(config, params, mesh))
    got, norm = jax.jit(step)(params, grads, fresh)
    expected, expected_norm = jax.jit(alone)(params, grads)
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree
