"""The fused loss: against the dense formula for awkward sizes, its gradients, its memory, and its denominators."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model import loss as module
from nanochat_jax.model.gpt import GPTConfig, forward, init
from nanochat_jax.model.loss import fused_weighted_nll, next_token_loss, target_weights, token_nll, weighted_nll
from tests.toy_params import toy_params

CAP = 15.0
SIZES = [(1, 8, 7), (127, 8, 101), (128, 8, 64), (300, 4, 1001)]  # N, C, V


@pytest.fixture(scope="module", params=["one chunk", "many chunks"])
def chunks(request):
    """Small problems in one piece, and cut up as large ones are. What is compiled for the one is of no use to the
    other; by module, so that it is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "many chunks":
            patch.setattr(module, "chunk_size", lambda *_: 64)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


def problem(n, c, v, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(3 * rng.normal(size=(n, c)), dtype)
    kernel = jnp.asarray(rng.normal(size=(c, v)), dtype)
    targets = rng.integers(0, v, n)
    weights = rng.normal(size=n).astype(np.float32)  # negative ones too: advantages are
    if n > 2:
        targets[1], weights[1] = -1, 0.0
    return hidden, kernel, jnp.asarray(targets), jnp.asarray(weights)


def dense_nll(hidden, kernel, targets, softcap):
    """Per-token nll (N,) the plain way; any value where the target is negative."""
    logits = softcap * jnp.tanh(hidden.astype(jnp.float32) @ kernel.astype(jnp.float32) / softcap)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]


value_and_grad = jax.jit(jax.value_and_grad(fused_weighted_nll, (0, 1)), static_argnums=4)


# in one piece it does not matter how the rows divide into chunks
SIZES_AND_CHUNKS = [*((size, "many chunks") for size in SIZES), *((size, "one chunk") for size in SIZES[::3])]


@pytest.mark.parametrize("size, chunks", SIZES_AND_CHUNKS, indirect=["chunks"])
def test_value_and_gradients_equal_the_dense_formula(size, chunks):
    hidden, kernel, targets, weights = problem(*size)

    def dense(hidden, kernel):
        return (weights * dense_nll(hidden, kernel, targets, CAP)).sum()

    expected, expected_grads = jax.device_get(jax.jit(jax.value_and_grad(dense, (0, 1)))(hidden, kernel))
    value, grads = value_and_grad(hidden, kernel, targets, weights, CAP)
    plain = jax.jit(fused_weighted_nll, static_argnums=4)(hidden, kernel, targets, weights, CAP)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-5)
    for ours, exact in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def test_gradient_scales_with_the_cotangent(chunks):
    hidden, kernel, targets, weights = problem(130, 8, 33)

    @jax.jit
    def gradient(factor, hidden):
        return jax.grad(lambda h: jnp.asarray(fused_weighted_nll(h, kernel, targets, weights, CAP)) * factor)(hidden)

    one, scaled = gradient(1.0, hidden), gradient(-2.5, hidden)
    np.testing.assert_allclose(scaled, -2.5 * one, rtol=1e-6)


def test_bf16_activations_keep_a_float32_loss(chunks):
    hidden, kernel, targets, weights = problem(300, 16, 65, jnp.bfloat16)
    value, grads = value_and_grad(hidden, kernel, targets, weights, CAP)
    dense = jax.jit(jax.value_and_grad(lambda h, k: (weights * dense_nll(h, k, targets, CAP)).sum(), (0, 1)))
    exact, exact_grads = dense(hidden.astype(jnp.float32), kernel.astype(jnp.float32))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=1e-4, atol=1e-3)  # bf16 logits would be off by 1e-2
    for ours, wanted in zip(grads, exact_grads, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), wanted, atol=0.02 * float(jnp.abs(wanted).max()))


def test_saturated_logits_have_finite_gradients():
    hidden, kernel, targets, weights = problem(40, 8, 33)
    value, grads = value_and_grad(1e4 * hidden, kernel, targets, weights, CAP)
    assert np.isfinite(value) and all(bool(jnp.isfinite(g).all()) for g in grads)


# ---------------------------------------------------------------------------------------------------------------------
# on a model


CONFIG = GPTConfig(sequence_len=32, vocab_size=61, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)


def batch(rows=4, length=24, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, CONFIG.vocab_size, (rows, length + 1)).astype(np.int32)
    inputs, targets = ids[:, :-1], ids[:, 1:].copy()
    targets[rng.random(targets.shape) < 0.2] = -1
    return inputs, targets, rng.random(targets.shape).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return toy_params(CONFIG)


@jax.jit
def dense_model_nll(params, inputs, targets):
    log_p = jax.nn.log_softmax(forward(CONFIG, params, inputs), axis=-1)
    nll = -jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets >= 0, nll, 0.0)


def test_token_nll_equals_dense(params, chunks):
    inputs, targets, _ = batch()
    nll = jax.jit(functools.partial(token_nll, CONFIG))(params, inputs, targets)
    assert nll.shape == targets.shape and nll.dtype == jnp.float32
    np.testing.assert_allclose(nll, dense_model_nll(params, inputs, targets), atol=1e-5)
    assert (np.asarray(nll)[targets < 0] == 0).all()


def test_next_token_loss_is_the_weighted_mean(params):
    inputs, targets, weights = batch()
    nll, kept = np.asarray(dense_model_nll(params, inputs, targets)), targets >= 0
    mean, _ = model_value_and_grad(params, inputs, targets)
    np.testing.assert_allclose(mean, nll.sum() / kept.sum(), rtol=1e-6)
    weighted, _ = model_value_and_grad(params, inputs, targets, weights)
    np.testing.assert_allclose(weighted, (weights * nll).sum() / (weights * kept).sum(), rtol=1e-6)


model_value_and_grad = jax.jit(jax.value_and_grad(lambda p, *b: next_token_loss(CONFIG, p, *b)))


def test_nothing_to_learn_is_zero_and_not_nan(params):
    inputs, targets, weights = batch()
    for y, w in ((targets, np.zeros_like(weights)), (np.full_like(targets, -1), weights)):
        value, grads = model_value_and_grad(params, inputs, y, w)
        assert value == 0.0
        assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def test_ignored_targets_equal_zero_weights(params):
    inputs, targets, _ = batch()
    filled = np.where(targets < 0, 3, targets)
    _, by_target = model_value_and_grad(params, inputs, targets)
    _, by_weight = model_value_and_grad(params, inputs, filled, (targets >= 0).astype(np.float32))
    for a, b in zip(jax.tree.leaves(by_target), jax.tree.leaves(by_weight), strict=True):
        np.testing.assert_array_equal(a, b)


def test_accumulation_invariance(params):
    """The sum over a batch is the sum over its pieces, uneven weights included, in value and in gradient."""
    inputs, targets, weights = batch(rows=8)
    weights = np.asarray(target_weights(jnp.asarray(targets), jnp.asarray(weights)))
    grad = jax.jit(jax.value_and_grad(lambda p, *b: weighted_nll(CONFIG, p, *b)))
    whole = grad(params, inputs, targets, weights)
    pieces = [grad(params, *(a[i : i + 1] for a in (inputs, targets, weights))) for i in range(8)]
    summed = jax.tree.map(lambda *x: sum(np.asarray(a) for a in x), *pieces)
    for a, b in zip(jax.tree.leaves(summed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_too_large_a_softcap_is_refused():
    hidden, kernel, targets, weights = problem(5, 4, 7)
    with pytest.raises(ValueError, match="softcap"):
        fused_weighted_nll(hidden, kernel, targets, weights, 61.0)


def test_first_loss_is_log_vocabulary():
    inputs, targets, _ = batch()
    value, grads = model_value_and_grad(init(CONFIG, jax.random.key(0)), inputs, targets)
    np.testing.assert_allclose(value, np.log(CONFIG.vocab_size), rtol=1e-6)
    moving = {jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if (g != 0).any()}
    assert moving == {"['lm_head']['kernel']"}  # with zero projections only the unembedding learns at first


@pytest.mark.parametrize("wanted", ["loss", "gradients"])
def test_never_holds_all_logits(wanted):
    """In the compiled program no array has the size of (B, T, V), whatever its shape."""
    config = GPTConfig(sequence_len=64, vocab_size=40_000, n_layer=1, n_head=1, n_kv_head=1, n_embd=8)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((128, 64), jnp.int32)

    def loss(params, ids):
        return next_token_loss(config, params, ids, ids)

    f = loss if wanted == "loss" else jax.value_and_grad(loss)
    text = jax.jit(f).lower(shapes, ids).compile().as_text() or ""
    sizes = [math.prod(int(n) for n in dims.split(",")) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) < 128 * 64 * 40_000 / 4
