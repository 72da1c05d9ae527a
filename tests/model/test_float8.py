"""Products in float8: close to exact ones, with gradients, and neutral where they are not asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model import float8
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.loss import next_token_loss
from tests.toy_params import toy_params


def norm_error(ours, exact) -> float:
    return float(np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("size", [1.0, 1e-6, 3e5])  # scales follow the largest value
def test_products_and_gradients_are_close_to_exact_ones(size):
    rng = np.random.default_rng(0)
    x, kernel, d = (rng.normal(size=shape) for shape in ((4, 24, 64), (64, 48), (4, 24, 48)))
    arrays = [jnp.asarray(a * size, jnp.bfloat16) for a in (x, kernel, d)]
    exact_x, exact_kernel, exact_d = (np.asarray(a, np.float64) for a in arrays)
    y, back = jax.vjp(float8.project, *arrays[:2])
    d_x, d_kernel = back(arrays[2])
    assert y.dtype == d_x.dtype == d_kernel.dtype == jnp.bfloat16 and d_x.shape == x.shape
    assert norm_error(y, exact_x @ exact_kernel) < 0.05
    assert norm_error(d_x, exact_d @ exact_kernel.T) < 0.08  # two bits of the gradient are kept
    assert norm_error(d_kernel, np.einsum("bti,bto->io", exact_x, exact_d)) < 0.08


def test_zeros_stay_zeros_and_a_nan_is_not_hidden():
    zeros = jnp.zeros((2, 32), jnp.bfloat16)
    kernel = jnp.ones((32, 16), jnp.bfloat16)
    assert not np.any(np.asarray(float8.project(zeros, kernel), np.float32))
    assert np.all(np.isnan(np.asarray(float8.project(zeros.at[0, 0].set(jnp.nan), kernel), np.float32)[0]))


def test_only_the_layers_are_in_float8_and_their_gradients_point_the_same_way():
    plain = GPTConfig(32, 64, 2, 2, 2, 32, compute_dtype="bfloat16")
    config = dataclasses.replace(plain, compute_dtype="float8")
    params = toy_params(plain)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, 33)), jnp.int32)

    def gradient(config):
        return lambda p: jax.grad(lambda p: next_token_loss(config, p, ids[:, :-1], ids[:, 1:]))(p)

    program = str(jax.make_jaxpr(gradient(config))(params))
    # of each of 2 x 6 products: two operands forward, the gradient backward
    casts = [program.count(f"new_dtype={name}") for name in ("float8_e4m3fn", "float8_e5m2")]
    assert casts == [2 * 12, 12] and "float8" not in str(jax.make_jaxpr(gradient(plain))(params))
    ours, exact = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(jax.jit(gradient(c))(params))]) for c in (config, plain)
    )
    assert float(ours @ exact / np.linalg.norm(ours) / np.linalg.norm(exact)) > 0.97
