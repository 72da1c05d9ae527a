"""The kernels for NVIDIA GPUs, run in Pallas' interpreter, against the functions that say what they compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model import fused, layers
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.gpt import init
from nanochat_jax.model.loss import next_token_loss

# bfloat16: half a unit in the last place of the result, and as much of the saved result that gradients work from
TOLERANCE = {"float32": dict(rtol=1e-5, atol=1e-5), "bfloat16": dict(rtol=2**-7, atol=2**-7)}


SIZES = [("float32", 3, 5, 40), ("bfloat16", 3, 5, 40), ("bfloat16", 1, 3, 64)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(fused, "INTERPRET", True)


def both(function, arguments, dtype):
    """(results and gradients of the function of `layers`, in float32; those of `fused`, in dtype), of random
    arguments; every result has a random cotangent."""
    rng = np.random.default_rng(0)
    arguments = [jnp.asarray(rng.normal(size=a.shape), a.dtype) if hasattr(a, "shape") else a for a in arguments]
    arguments = [a.astype(dtype) if hasattr(a, "ndim") and a.ndim > 1 else a for a in arguments]

    def run(module, arguments):
        results, pullback = jax.vjp(lambda *a: function(module, *a), *arguments)
        rng = np.random.default_rng(1)
        cotangents = jax.tree.map(lambda r: jnp.asarray(rng.normal(size=r.shape), dtype).astype(r.dtype), results)
        return jax.tree.map(lambda x: np.asarray(x, np.float32), (results, pullback(cotangents)))

    exact = [a.astype(jnp.float32) for a in arguments]
    return run(layers, exact), run(fused, arguments)


def assert_close(found, dtype):
    plain, ours = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, **TOLERANCE[dtype]), plain, ours)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("dtype,B,T,C", SIZES)
def test_norm_beside_the_stream(dtype, B, T, C):
    assert_close(both(lambda m, x: m.with_norm(x), [array(B, T, C)], dtype), dtype)


@pytest.mark.parametrize("dtype,B,T,C", SIZES)
def test_mixing_and_norm(dtype, B, T, C):
    """With the gradients of both factors, which are sums over all that is mixed."""
    arguments = [array(B, T, C), array(B, T, C), array(), array()]
    plain, ours = both(lambda m, x, x0, r, z: m.mixed_with_norm(x, x0, (r, z)), arguments, dtype)
    (*d_arrays, d_r, d_z), (*d_ours, our_r, our_z) = plain[1], ours[1]
    assert_close(((plain[0], d_arrays), (ours[0], d_ours)), dtype)
    norms = [np.linalg.norm(ours[0][0]) * np.linalg.norm(d_arrays[0])] * 2  # what the sums could be at most
    np.testing.assert_allclose([our_r / norms[0], our_z / norms[1]], [d_r / norms[0], d_z / norms[1]], atol=2**-10)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_rotary_and_norm(dtype, factor):
    T, heads, D = 5, 3, 16
    cos, sin = (t[None, :, None] for t in layers.rotary_tables(T, D, 10000.0))
    assert_close(both(lambda m, x: m.rotary_norm(x, cos, sin, factor), [array(3, T, heads, D)], dtype), dtype)


def test_a_model_with_the_kernels_is_the_model():
    shape = dict(sequence_len=7, vocab_size=33, n_layer=1, n_head=3, n_kv_head=1, n_embd=48)
    config = GPTConfig.modern(**shape, remat="block")
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), init(config, next(keys)))
    ids = jax.random.randint(next(keys), (2, 8), 0, 33)

    def loss(config):
        return jax.jit(jax.value_and_grad(lambda p: next_token_loss(config, p, ids[:, :-1], ids[:, 1:])))(params)

    plain, kernels = loss(config), loss(dataclasses.replace(config, fused=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5), plain, kernels)
