"""The model is the reference's: golden numbers, and a second slow implementation for seeds and shapes beyond them."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.convert.params_reference import params_from_reference, params_to_reference
from nanochat_jax.model import gpt
from nanochat_jax.model.gpt import GPTConfig, forward, init
from nanochat_jax.model.kv_cache import KVCache
from nanochat_jax.model.loss import next_token_loss, token_nll
from tests.golden_models import below, golden_arrays, golden_model
from tests.toy_params import toy_params

NAMES = sorted({name.split("/")[0] for name in golden_arrays("model_v1")})


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """(config, params, arrays) of one golden model: A has grouped heads, B an odd vocabulary."""
    prefix = f"{request.param}/"
    return *golden_model("model_v1", prefix), below(golden_arrays("model_v1"), prefix)


# Run at once, not operation by operation: each of those would be a program to compile.
run_forward = jax.jit(forward, static_argnums=0)
hidden_states = jax.jit(gpt.hidden_states, static_argnums=0)
forward_cached = jax.jit(gpt.forward_cached, static_argnums=0)
unembed = jax.jit(gpt.unembed, static_argnums=0)
loss_and_gradients = jax.jit(jax.value_and_grad(next_token_loss, 1), static_argnums=0)


def test_logits(case):
    config, params, arrays = case
    np.testing.assert_allclose(run_forward(config, params, arrays["ids"]), arrays["logits"], atol=1e-4, rtol=1e-4)
    hidden = hidden_states(config, params, arrays["ids"])
    np.testing.assert_allclose(hidden, arrays["inner/final_normed"], atol=1e-4, rtol=1e-4)


def test_losses(case):
    config, params, arrays = case
    ids, targets = arrays["ids"], arrays["targets"]
    every, nll = arrays["loss_none_unmasked_targets"], jax.jit(token_nll, static_argnums=0)
    for of, kind in ((targets, ""), (every, "_unmasked")):
        loss, _ = loss_and_gradients(config, params, ids, of)
        np.testing.assert_allclose(loss, arrays[f"loss_mean{kind}"], atol=2e-5)
        np.testing.assert_allclose(nll(config, params, ids, of), arrays[f"loss_none{kind}"], atol=2e-5)


@pytest.mark.parametrize("case, remat", [*((n, "none") for n in NAMES), (NAMES[0], "mlp"), (NAMES[0], "block")],
                         indirect=["case"])  # fmt: skip
def test_gradients(case, remat):
    config, params, arrays = case
    config = dataclasses.replace(config, remat=remat)
    _, grads = loss_and_gradients(config, params, arrays["ids"], arrays["targets"])
    ours, theirs = params_to_reference(config, grads), below(arrays, "grad/")
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        np.testing.assert_allclose(ours[name], g, rtol=0, atol=1e-4 * np.abs(g).max(), err_msg=name)


def test_rotary(case):
    config, _, arrays = case
    cos, sin = gpt.rotary_tables(10 * config.sequence_len, config.head_dim, config.rotary_base)
    np.testing.assert_array_equal(cos, arrays["rotary/cos"])
    np.testing.assert_array_equal(sin, arrays["rotary/sin"])
    x = arrays["rotary/apply_in"]
    T = x.shape[1]
    turned = gpt.apply_rotary(jnp.asarray(x), *(jnp.asarray(t)[None, :T, None] for t in (cos, sin)))
    np.testing.assert_allclose(turned, arrays["rotary/apply_out"], atol=1e-6)


def test_cached_chunks(case):
    """A prefill, single tokens and a chunk through the cache: logits and cache content of the reference."""
    config, params, arrays = case
    ids = arrays["ids"]
    B, T = ids.shape
    cache = KVCache.create(config.n_layer, B, config.n_kv_head, T + 3, config.head_dim, jnp.float32)
    at, logits = 0, []
    for n in arrays["kv/splits"].tolist():
        hidden, cache = forward_cached(config, params, ids[:, at : at + n], cache)
        cache = cache.advance(n)
        logits.append(unembed(config, params, hidden))
        at += n
    np.testing.assert_allclose(np.concatenate(logits, axis=1), arrays["kv/logits"], atol=1e-4, rtol=1e-4)
    for i, buffers in enumerate((cache.new_keys, cache.new_values)):
        stored = np.stack(buffers).reshape(config.n_layer, B, config.n_kv_head, -1, config.head_dim)[:, :, :, :T]
        np.testing.assert_allclose(stored, arrays["kv/cache"][:, i], atol=1e-4, rtol=1e-4)


def test_reference_names_round_trip(case):
    config, params, arrays = case
    back, theirs = params_to_reference(config, params), below(arrays, "param/")
    assert back.keys() == theirs.keys()
    for name, a in theirs.items():
        np.testing.assert_array_equal(back[name], a)
    broken = {**back, "extra": back["lm_head.weight"], "transformer.wte.weight": back["transformer.wte.weight"].T}
    del broken["lm_head.weight"]
    with pytest.raises(ValueError, match="missing lm_head.weight; unexpected extra; transformer.wte.weight has shape"):
        params_from_reference(config, broken)


# ---------------------------------------------------------------------------------------------------------------------
# an independent version, one row, one head, one query at a time in float64


def slow_norm(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 2.0**-23)


def slow_rotate(x, position, table):
    cos, sin = table[0][position].astype(np.float64), table[1][position].astype(np.float64)
    a, b = np.split(x, 2)
    return np.concatenate([a * cos + b * sin, b * cos - a * sin])


def slow_forward(config, weights, ids):
    """Logits (T, V) of one row of ids from reference-named (out, in) weights."""
    w = {name: np.asarray(a, np.float64) for name, a in weights.items()}
    D, shared = config.head_dim, config.n_head // config.n_kv_head
    # exponent, frequency and angle are float32 numbers by definition (reference); cos and sin are exact, then rounded
    speed = [np.float32(1) / np.float32(config.rotary_base ** float(np.float32(i / D))) for i in range(0, D, 2)]
    angle = [[float(np.float32(t) * s) for s in speed] for t in range(len(ids))]
    exact = [np.array([[f(a) for a in row] for row in angle]) for f in (math.cos, math.sin)]
    table = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in exact]
    x = slow_norm(w["transformer.wte.weight"][ids])
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}."
        normed = slow_norm(x)
        q, k, v = (normed @ w[f"{name}attn.c_{s}.weight"].T for s in "qkv")
        out = np.zeros_like(x)
        for h in range(config.n_head):
            mine, theirs = slice(h * D, (h + 1) * D), slice(h // shared * D, (h // shared + 1) * D)
            keys = [slow_norm(slow_rotate(k[t, theirs], t, table)) for t in range(len(ids))]
            for t in range(len(ids)):
                first = 0 if config.window(layer) is None else max(0, t - config.window(layer))
                query = slow_norm(slow_rotate(q[t, mine], t, table))
                scores = np.array([key @ query for key in keys[first : t + 1]]) / np.sqrt(D)
                weight = np.exp(scores - scores.max())
                out[t, mine] = weight / weight.sum() @ v[first : t + 1, theirs]
        x = x + out @ w[f"{name}attn.c_proj.weight"].T
        hidden = np.maximum(slow_norm(x) @ w[f"{name}mlp.c_fc.weight"].T, 0) ** 2
        x = x + hidden @ w[f"{name}mlp.c_proj.weight"].T
    return config.softcap * np.tanh(slow_norm(x) @ w["lm_head.weight"].T / config.softcap)


VARIED = [
    GPTConfig(sequence_len=40, vocab_size=101, n_layer=2, n_head=2, n_kv_head=2, n_embd=48),
    GPTConfig(sequence_len=90, vocab_size=33, n_layer=3, n_head=6, n_kv_head=3, n_embd=60),
    GPTConfig(sequence_len=8, vocab_size=500, n_layer=1, n_head=4, n_kv_head=1, n_embd=32, softcap=7.0),
    GPTConfig(sequence_len=160, vocab_size=70, n_layer=3, n_head=2, n_kv_head=1, n_embd=16, window_pattern="SL"),
]


@pytest.mark.parametrize("seed, config", list(enumerate(VARIED)))
@pytest.mark.slow
def test_other_shapes_against_the_slow_version(seed, config):
    params = toy_params(config, seed)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, config.sequence_len))
    logits = np.asarray(run_forward(config, params, jnp.asarray(ids)))
    weights = params_to_reference(config, params)
    for row in range(2):
        np.testing.assert_allclose(logits[row], slow_forward(config, weights, ids[row]), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_gradient_of_the_whole_model_is_the_slope_of_the_slow_version():
    """A directional derivative of the float64 model, by central differences."""
    config = VARIED[1]
    params, ids = toy_params(config, 7), np.random.default_rng(7).integers(0, config.vocab_size, (1, 21))
    x, y = jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])
    direction = jax.tree.map(lambda p: jnp.sign(p) * 0.01, toy_params(config, 8))
    _, grads = loss_and_gradients(config, params, x, y)
    slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    base, along = params_to_reference(config, params), params_to_reference(config, direction)

    def loss(step):
        weights = {name: base[name].astype(np.float64) + step * along[name] for name in base}
        logits = slow_forward(config, weights, ids[0, :-1])
        shifted = np.log(np.exp(logits).sum(-1)) - logits[np.arange(20), ids[0, 1:]]
        return shifted.mean()

    np.testing.assert_allclose(slope, (loss(1e-4) - loss(-1e-4)) / 2e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [VARIED[0], pytest.param(VARIED[1], marks=pytest.mark.slow), VARIED[3]])
def test_causal(config):
    """Changing token t changes no logit before t, bit for bit, and does change t."""
    params = toy_params(config, 3)
    ids = np.random.default_rng(3).integers(0, config.vocab_size, (1, config.sequence_len))
    base = np.asarray(run_forward(config, params, ids))
    for t in (1, config.sequence_len // 2, config.sequence_len - 1):
        other = ids.copy()
        other[0, t] = (other[0, t] + 1) % config.vocab_size
        moved = np.abs(np.asarray(run_forward(config, params, other)) - base).max(-1)[0]
        assert (moved[:t] == 0).all() and moved[t] > 0


def test_bf16_activations_keep_float32_norms_and_logits():
    config = VARIED[0]
    low = dataclasses.replace(config, compute_dtype="bfloat16")
    params = toy_params(config)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 40)))
    logits = run_forward(low, params, ids)
    assert logits.dtype == jnp.float32
    assert jax.eval_shape(lambda: gpt.hidden_states(low, params, ids)).dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, run_forward(config, params, ids), atol=0.15)
    _, grads = loss_and_gradients(low, params, ids, ids)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm_and_its_gradient(dtype):
    x, d = np.random.default_rng(0).standard_normal((2, 4, 5, 24), np.float32)
    x[0, 0] = 0
    x, d = (3 * x).astype(dtype), d.astype(dtype)

    def plain(x):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 2.0**-23)

    @functools.partial(jax.jit, static_argnums=0)
    def out_and_gradient(f, x, d):
        out, back = jax.vjp(f, x)
        return out, *back(d)

    exact, wanted = out_and_gradient(plain, x.astype(np.float32), d.astype(np.float32))
    ours, gradient = out_and_gradient(gpt.rms_norm, x, d)
    assert ours.dtype == gradient.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(np.float32(ours), exact, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(np.float32(gradient), wanted, atol=tolerance, rtol=tolerance)


def test_window_of_the_layers():
    config = GPTConfig(sequence_len=1024, n_layer=5, window_pattern="SSL")
    assert [config.window(i) for i in range(5)] == [256, 256, 1024, 256, 1024]
    assert GPTConfig(n_layer=2).windows == (None, None)
    assert GPTConfig(sequence_len=100, n_layer=2, window_pattern="S").window(0) == 128


# ---------------------------------------------------------------------------------------------------------------------
# initialisation and the table of depths


def test_initialisation(golden):
    record = json.loads((golden / "init_v1.json").read_text())
    config = GPTConfig(**record["config"])
    assert gpt.num_params(config) == record["num_params"]
    assert gpt.flops_per_token(config) == record["estimate_flops_per_token"]
    drawn = params_to_reference(config, init(config, jax.random.key(42)))
    assert drawn.keys() == record["params"].keys()
    for name, expected in record["params"].items():
        array = drawn[name]
        assert list(array.shape) == expected["shape"] and array.dtype == np.float32
        assert (array == 0).sum() == expected["num_zero"], name
        np.testing.assert_allclose(array.std(), expected["std"], rtol=5 / np.sqrt(2 * array.size), err_msg=name)
        assert abs(array.mean()) <= 5 * expected["std"] / np.sqrt(array.size)
    distinct = {a.tobytes() for a in drawn.values() if a.any()}
    assert len(distinct) == sum(bool(a.any()) for a in drawn.values())  # no two tensors share a draw
    again = params_to_reference(config, init(config, jax.random.key(42)))
    other = params_to_reference(config, init(config, jax.random.key(43)))
    assert all((again[n] == drawn[n]).all() for n in drawn)
    assert not (other["transformer.wte.weight"] == drawn["transformer.wte.weight"]).any()


def test_a_seed_draws_the_same_values_in_every_release():
    """Ours, not the reference's: pinned so that a run can be begun again years later."""
    config = GPTConfig(sequence_len=8, vocab_size=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)
    drawn = params_to_reference(config, init(config, jax.random.key(42, impl="threefry2x32")))
    pinned = {
        "transformer.wte.weight": [0.68500477, -1.1071224],
        "transformer.h.0.attn.c_q.weight": [0.10807662, 0.23112284],
        "transformer.h.0.attn.c_k.weight": [0.01342187, -0.35148892],
        "transformer.h.0.attn.c_v.weight": [-0.04983241, 0.01064044],
        "transformer.h.0.mlp.c_fc.weight": [0.16372944, 0.04868789],
        "transformer.h.1.attn.c_q.weight": [0.03596184, 0.02018248],
        "transformer.h.1.attn.c_k.weight": [-0.04497265, -0.11665713],
        "transformer.h.1.mlp.c_fc.weight": [0.01498275, 0.15503687],
    }
    for name, values in pinned.items():
        np.testing.assert_allclose(drawn[name].ravel()[:2], values, rtol=1e-6, err_msg=name)


def test_table_of_depths(golden):
    for row in json.loads((golden / "lr_v1.json").read_text())["depth_table"]:
        config = GPTConfig.from_depth(row["depth"], row["vocab_size"], 2048)
        assert (config.n_layer, config.n_embd) == (row["num_layers"], row["model_dim"])
        assert (config.n_head, config.n_kv_head) == (row["num_heads"], row["num_kv_heads"])
        assert gpt.num_params(config) == row["num_params"]
        assert gpt.flops_per_token(config) == row["num_flops_per_token"]


@pytest.mark.parametrize("depth", range(1, 40))
def test_every_depth_gives_a_valid_model(depth):
    config = GPTConfig.from_depth(depth, 512, 128)
    assert config.n_head * config.head_dim == config.n_embd and config.head_dim % 2 == 0 and config.head_dim <= 128
    assert 64 * depth <= config.n_embd < 64 * depth + 128


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(n_embd=100), "n_embd"),
        (dict(n_kv_head=4), "n_kv_head"),
        (dict(n_embd=18), "even"),
        (dict(window_pattern="X"), "window_pattern"),
        (dict(compute_dtype="fp8"), "compute_dtype"),
        (dict(attention="flash"), "attention"),
        (dict(remat="some"), "remat"),
    ],
)
def test_bad_configs_name_the_field(wrong, word):
    with pytest.raises(ValueError, match=word):
        GPTConfig(**wrong)


def test_too_long_a_row_is_refused():
    config = VARIED[2]
    with pytest.raises(ValueError, match="rotary range"):
        forward(config, toy_params(config), jnp.zeros((1, 81), jnp.int32))
