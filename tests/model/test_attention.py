"""Attention: every path against a slow numpy version, causality, windows, gradients, and which path is chosen."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from nanochat_jax.model import attention as module
from nanochat_jax.model.attention import attention, blocked_attention, choose_implementation
from nanochat_jax.utils.errors import InputError

SHAPES = [  # B, T, H, G, D: multi-head, grouped, one shared head; lengths of one block, of several, and awkward ones
    (2, 64, 2, 2, 16),
    (2, 70, 4, 2, 16),
    (1, 200, 4, 1, 8),
    (1, 1, 2, 2, 16),
    (1, 540, 2, 1, 8),
]
WINDOWS = [None, 0, 7, 64, 10_000]


def xla_attention(q, k, v, window):
    local = None if window is None else (window, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation="xla")


PATHS = {"blocked": blocked_attention, "xla": xla_attention}


def attention_by_xla(q, k, v, window):
    """`attention` as it runs on accelerators without cuDNN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose_implementation", lambda *_: ("xla", "asked for by a test"))
        return attention(q, k, v, window=window)


def tensors(shape, dtype=jnp.float32, seed=0):
    B, T, H, G, D = shape
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, T, n, D)), dtype) for n in (H, G, G)]


@functools.partial(jax.jit, static_argnums=0)
def out_and_gradients(f, tensors, d_out):
    """f(*tensors), and what d_out means for each of them, as one program."""
    out, back = jax.vjp(f, *tensors)
    return out, back(d_out)


def slow_attention(q, k, v, window):
    """One query at a time in float64: itself and at most `window` earlier keys."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    B, T, H, D = q.shape
    for h in range(H):
        g = h // (H // k.shape[2])
        for t in range(T):
            first = 0 if window is None else max(0, t - window)
            for b in range(B):
                scores = k[b, first : t + 1, g] @ q[b, t, h] / np.sqrt(D)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ v[b, first : t + 1, g] / weights.sum()
    return out


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_slow_version(shape, window):
    q, k, v = tensors(shape)
    expected = slow_attention(q, k, v, window)
    for out in jax.jit(lambda *x: [path(*x, window=window) for path in (attention, attention_by_xla)])(q, k, v):
        assert out.dtype == q.dtype and out.shape == q.shape
        np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_causal_on_every_path(shape, window):
    """Perturbing token t changes nothing before t, and with a window nothing after t + window; t itself changes."""
    given = [np.asarray(x) for x in tensors(shape)]
    run = jax.jit(lambda *x: {name: path(*x, window) for name, path in PATHS.items()})
    base = run(*given)
    T = shape[1]
    for t in {0, 1, T // 2, T - 1}:
        others = [x.copy() for x in given]
        for x in others:
            x[:, t] += 3.0
        for name, changed in run(*others).items():
            moved = np.abs(np.asarray(changed) - np.asarray(base[name])).max(axis=(0, 2, 3)) > 0
            assert not moved[:t].any(), name
            assert moved[t], name
            if window is not None:
                assert not moved[t + window + 1 :].any(), name
                assert moved[min(t + window, T - 1)], name


FAST = {(0, None), (1, 64), (2, None), (3, 64), (4, 64)}  # every shape once, both kinds of window; the rest is slow
GRADIENTS = [
    pytest.param(shape, window, marks=() if (i, window) in FAST else pytest.mark.slow)
    for i, shape in enumerate(SHAPES)
    for window in (None, 0, 64)
]


@pytest.mark.parametrize("shape, window", GRADIENTS)
def test_gradients_match_plain_formula(shape, window):
    d_out = tensors(shape, seed=1)[0]

    def on_path(path):
        return out_and_gradients(functools.partial(path, window=window), tensors(shape), d_out)[1]

    for ours, plain in zip(*map(on_path, PATHS.values()), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5, rtol=1e-5)


def test_bf16_inputs():
    """bf16 in and out, the softmax in float32: both directions within bf16 rounding of the float32 result."""
    shape, window = (2, 150, 4, 2, 16), 9
    low = tensors(shape, jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in low]
    d_low = tensors(shape, jnp.bfloat16, seed=1)[0]
    out_low, grads_low = out_and_gradients(functools.partial(blocked_attention, window=window), low, d_low)
    out, grads = out_and_gradients(functools.partial(xla_attention, window=window), exact, d_low.astype(jnp.float32))
    assert out_low.dtype == jnp.bfloat16
    np.testing.assert_allclose(out_low.astype(jnp.float32), out, atol=0.03)
    for ours, plain in zip(grads_low, grads, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), plain, atol=0.03 * float(jnp.abs(plain).max()))


def test_large_scores_do_not_overflow():
    q, k, v = tensors((1, 80, 1, 1, 16))
    out, grads = out_and_gradients(blocked_attention, (300.0 * q, 300.0 * k, v), v)
    np.testing.assert_allclose(out, slow_attention(300.0 * q, 300.0 * k, v, None), atol=1e-4)
    assert all(bool(jnp.isfinite(x).all()) for x in grads)


def test_probabilities_are_not_kept_for_the_backward_pass():
    """What the forward pass hands over is linear in the length: no (T, T) array."""
    T = 1024
    q, k, v = tensors((1, T, 2, 2, 8))
    _, back = jax.jit(lambda *x: jax.vjp(blocked_attention, *x))(q, k, v)
    assert max(x.size for x in jax.tree.leaves(back)) <= q.size


def test_same_under_shard_map():
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    q, k, v = tensors((2, 70, 4, 2, 16))

    def loss(q, k, v):
        return jnp.sum(jnp.square(attention(q, k, v, window=9)))

    grad = jax.grad(loss, (0, 1, 2))
    rows, expected = jax.P("data"), jax.jit(grad)(q, k, v)
    for check in (False, True):
        sharded = jax.shard_map(grad, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check)
        for ours, plain in zip(jax.jit(sharded)(q, k, v), expected, strict=True):
            np.testing.assert_allclose(ours, plain, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# which path


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that the first device is a GPU; call it with a platform version and a compute capability."""

    def pretend(version="cuda 12090", capability="9.0"):
        device = types.SimpleNamespace(
            client=types.SimpleNamespace(platform_version=version), compute_capability=capability
        )
        monkeypatch.setattr(module.jax, "devices", lambda: [device])

    choose_implementation.cache_clear()
    yield pretend
    choose_implementation.cache_clear()


@pytest.mark.parametrize("capability", ["8.0", "8.9", "12.0"])
def test_cudnn_is_chosen_on_a_capable_gpu(gpu, capability):
    gpu(capability=capability)
    chosen, reason = choose_implementation("auto", "gpu", "bfloat16", 128)
    assert chosen == "cudnn" and capability in reason
    assert choose_implementation("cudnn", "gpu", "bfloat16", 128)[0] == "cudnn"
    assert choose_implementation("xla", "gpu", "bfloat16", 128) == ("xla", "requested")


@pytest.mark.parametrize(
    "device, dtype, head, word",
    [
        ({}, "float32", 128, "float32"),
        ({}, "bfloat16", 256, "256"),
        ({}, "bfloat16", 36, "36"),
        ({"version": "rocm 6"}, "bfloat16", 128, "NVIDIA"),
        ({"capability": "7.5"}, "bfloat16", 128, "7.5"),
    ],
)
def test_gpu_without_cudnn_says_why(gpu, device, dtype, head, word):
    gpu(**device)
    chosen, reason = choose_implementation("auto", "gpu", dtype, head)
    assert chosen == "xla" and word in reason
    with pytest.raises(ValueError, match=word):
        choose_implementation("cudnn", "gpu", dtype, head)


def test_cpu_runs_the_blocked_path():
    assert choose_implementation("auto", "cpu", "float32", 128) == ("blocked", "the backend is cpu")
    assert choose_implementation("xla", "cpu", "float32", 128)[0] == "blocked"
    with pytest.raises(ValueError, match="bf16"):
        choose_implementation("cudnn", "cpu", "float32", 128)
    with pytest.raises(ValueError, match="must be"):
        choose_implementation("flash", "cpu", "float32", 128)


def test_requested_cudnn_without_the_plugin_names_the_remedy(monkeypatch):
    def absent():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", absent)
    q, k, v = tensors((1, 16, 2, 2, 16), jnp.bfloat16)
    with pytest.raises(InputError, match="cuda12"):
        attention(q, k, v, implementation="cudnn")


@pytest.mark.parametrize("T", [16, 17, 1])  # cuDNN itself refuses odd lengths
@pytest.mark.parametrize("window", [None, 4])
def test_cudnn_request_lowers_to_cudnn_calls(monkeypatch, window, T):
    """Lowered for CUDA (which needs no GPU), forward and backward are cuDNN's, grouped heads and window included."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91002)
    q, k, v = tensors((2, T, 6, 2, 32), jnp.bfloat16)
    window = None if window is not None and window >= T else window

    def loss(q, k, v):
        return attention(q, k, v, window=window, implementation="cudnn").astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    calls = set(re.findall(r"custom_call @([\w$.]+)", text))
    assert calls >= {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    # what each call is told: a causal mask, and the window as the number of keys seen (0: all)
    told = text.replace("\\22", "")  # quotation marks
    masks, windows = (re.findall(rf"{name}: (\w+)", told) for name in ("mask_type", "sliding_window_length"))
    assert set(masks) == {"CAUSAL"} and len(masks) == 2
    assert set(windows) == {"0" if window is None else str(window + 1)} and len(windows) == 2
