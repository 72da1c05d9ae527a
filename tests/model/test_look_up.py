"""The gradient of an embedding is added up in float32, whatever the activations are, on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax.model.gpt import GPTConfig, abstract
from nanochat_jax.model.layers import look_up
from nanochat_jax.model.loss import next_token_loss
from nanochat_jax.parallel import sharding
from nanochat_jax.training.optim import OptimHyper, make_optimizer
from nanochat_jax.training.step import abstract_state, make_train_step

CONFIG = GPTConfig.modern(16, 64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, compute_dtype="bfloat16")
TABLES = 2  # the embedding and, of two layers, one of values


def additions(jaxpr, found=None) -> list[str]:
    """The dtypes of all scatter-adds into tables, in a jaxpr and all that it calls."""
    found = [] if found is None else found
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scatter-add" and equation.outvars[0].aval.ndim == 2:
            found.append(str(equation.outvars[0].aval.dtype))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                additions(inner, found)
    return found


def test_gradients_of_a_frequent_token_lose_nothing():
    table, ids = jnp.zeros((4, 2)), jnp.ones((4096,), jnp.int32)
    d = jnp.full((4096, 2), 1.0, jnp.bfloat16)
    rows, back = jax.vjp(lambda table: look_up(table, ids, jnp.bfloat16), table)
    assert rows.dtype == jnp.bfloat16 and float(back(d)[0][1, 0]) == 4096.0  # in bfloat16 it would stop at 256


def test_a_model_adds_up_in_float32():
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    loss = jax.grad(lambda params, x, y: next_token_loss(CONFIG, params, x, y))
    assert additions(jax.make_jaxpr(loss)(abstract(CONFIG), ids, ids).jaxpr) == ["float32"] * TABLES


@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_so_does_the_step_of_every_mesh(fsdp, tensor, remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    mesh = sharding.make_mesh(jax.devices()[:4], fsdp, tensor)
    optimizer = make_optimizer(OptimHyper.of("modern"), 10, config.n_embd)
    step = make_train_step(config, optimizer, mesh, guarded=True)
    traced = jax.make_jaxpr(step)(*_arguments(config, optimizer, mesh))
    found = additions(traced.jaxpr)
    assert found and set(found) == {"float32"}


def _arguments(config, optimizer, mesh):
    tokens = jax.ShapeDtypeStruct((2, 4, 16), jnp.int32)
    weights, limits = jax.ShapeDtypeStruct(tokens.shape, jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    return abstract_state(config, optimizer, mesh), tokens, tokens, weights, limits
