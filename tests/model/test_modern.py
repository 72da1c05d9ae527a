"""The parts of the reference's current recipe: its golden numbers, each part neutral when off, smear and documents."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.convert.params_reference import params_from_reference, params_to_reference
from nanochat_jax.model import gpt
from nanochat_jax.model.config import MODERN, GPTConfig
from nanochat_jax.model.kv_cache import KVCache
from nanochat_jax.model.loss import fused_weighted_nll, next_token_loss, token_nll, token_statistics
from nanochat_jax.model.parameters import num_params, num_params_by_group, num_scaling_params
from tests.golden_models import golden_arrays
from tests.toy_params import toy_params

SIX = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")

run_forward = jax.jit(gpt.forward, static_argnums=0)
forward_cached = jax.jit(gpt.forward_cached, static_argnums=0)
loss_and_gradients = jax.jit(jax.value_and_grad(next_token_loss, 1), static_argnums=0)


NAMES = sorted({name.split("/")[0] for name in golden_arrays("model_modern")})


@pytest.fixture(scope="module", params=NAMES)
def case(request, golden):
    """(config, params, arrays) of one golden model: grouped heads and a padded vocabulary, or neither."""
    with np.load(golden / "model_modern.npz") as archive:
        prefix = request.param + "/"
        arrays = {name.removeprefix(prefix): archive[name] for name in archive.files if name.startswith(prefix)}
    sizes: dict[str, Any] = {name: int(arrays[f"config/{name}"]) for name in SIX}
    pattern = "".join(map(chr, arrays["config/window_pattern_codes"]))
    config = GPTConfig.modern(**sizes, window_pattern=pattern, smear_across_documents=True)
    return config, params_from_reference(config, group(arrays, "param/")), arrays


def group(arrays, prefix):
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def test_sizes(case):
    config, _, arrays = case
    assert config.windows == tuple(arrays["window_left_per_layer"])
    embedded = arrays["has_value_embedding_per_layer"].tolist()
    assert [config.has_value_embed(i) for i in range(config.n_layer)] == embedded
    assert config.padded_vocab_size == arrays["config/padded_vocab_size"]


def test_logits_and_losses(case):
    config, params, arrays = case
    ids, targets = arrays["ids"], arrays["targets"]
    close = dict(atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(run_forward(config, params, ids), arrays["logits"], **close)
    short = arrays["short/logits"]
    np.testing.assert_allclose(run_forward(config, params, ids[:, : short.shape[1]]), short, **close)
    nll = jax.jit(token_nll, static_argnums=0)(config, params, ids, targets)
    np.testing.assert_allclose(nll, arrays["loss_none"], atol=2e-5)
    logprob, _ = jax.jit(token_statistics, static_argnums=0)(config, params, ids, targets)
    np.testing.assert_allclose(-logprob, arrays["loss_none"], atol=2e-5)


@pytest.mark.parametrize("remat", gpt.REMAT_MODES)
def test_gradients(case, remat):
    config, params, arrays = case
    config = dataclasses.replace(config, remat=remat)
    loss, grads = loss_and_gradients(config, params, arrays["ids"], arrays["targets"])
    np.testing.assert_allclose(loss, arrays["loss_mean"], atol=2e-5)
    ours, theirs = params_to_reference(config, grads), group(arrays, "grad/")
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        np.testing.assert_allclose(ours[name], g, rtol=0, atol=1e-4 * np.abs(g).max(), err_msg=name)


def test_cached(case):
    """A prefill and single tokens as the reference; prompts in several chunks as well, where the reference forgets the
    token before."""
    config, params, arrays = case
    ids, expected = arrays["ids"], arrays["kv/logits_from_last_prefill_position"]
    first = int(arrays["kv/prefill_len"])
    for chunks in ([first], [first - first // 2, first // 2 - first // 4, first // 4]):
        chunks = [n for n in chunks if n]
        chunks = chunks + [1] * (ids.shape[1] - first)
        cache = KVCache.create(config.n_layer, len(ids), config.n_kv_head, ids.shape[1], config.head_dim, jnp.float32)
        at, logits = 0, []
        for n in chunks:
            hidden, cache = forward_cached(config, params, ids[:, at : at + n], cache)
            cache = cache.advance(n)
            logits.append(gpt.unembed(config, params, hidden))
            at += n
        logits = np.concatenate(logits, axis=1)[:, first - 1 :]
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


def test_initialisation(golden):
    record = json.loads((golden / "init_modern.json").read_text())
    config = GPTConfig.modern(**record["config"])
    assert config.windows == tuple(left for left, _ in record["window_sizes"])
    assert gpt.flops_per_token(config) == record["estimate_flops_per_token"]
    groups, counts = num_params_by_group(config), record["num_scaling_params"]
    assert num_params(config) == counts["total"] and groups["value_embeds"] == counts["value_embeds"]
    assert num_scaling_params(config) == counts["transformer_matrices"] + counts["lm_head"]
    drawn = params_to_reference(config, gpt.init(config, jax.random.key(42)))
    assert drawn.keys() == record["params"].keys()
    for name, expected in record["params"].items():
        array = drawn[name]
        assert list(array.shape) == expected["shape"] and (array == 0).sum() == expected["num_zero"], name
        if "values" in expected and not name.endswith("weight"):
            np.testing.assert_allclose(array, expected["values"], rtol=1e-6, err_msg=name)
            continue
        np.testing.assert_allclose(array.std(), expected["std"], rtol=5 / np.sqrt(2 * array.size), err_msg=name)
        assert abs(array.mean() - expected["mean"]) <= 7 * expected["std"] / np.sqrt(array.size), name
        if expected["max"] < 4 * expected["std"]:  # uniform: within the same bounds
            bound = max(abs(expected["min"]), expected["max"])
            assert np.abs(array).max() <= bound * (1 + 20 / array.size), name


@pytest.mark.parametrize(
    "depth, scaling, total, flops",
    [
        (4, 11_534_384, 36_700_242, 8.022e7),
        (8, 41_943_232, 125_829_354, 2.957e8),
        (12, 110_100_912, 286_261_730, 7.597e8),
        (20, 435_160_240, 896_533_746, 2.886e9),
        (24, 729_810_624, 1_384_122_122, 4.775e9),
        (26, 918_423_532, 1_681_786_938, 5.991e9),
        (32, 1_677_724_672, 2_818_575_450, 1.077e10),
    ],
)
def test_counts_of_depths(depth, scaling, total, flops):
    """The reference's, with 32,768 entries and 2,048 tokens."""
    config = GPTConfig.from_depth(depth, 32_768, 2048, recipe="modern")
    assert (num_scaling_params(config), num_params(config)) == (scaling, total)
    assert float(f"{gpt.flops_per_token(config):.3e}") == flops


CONFIG = GPTConfig.modern(64, 90, 3, 4, 2, 32, smear_across_documents=True)
NEUTRAL = {f.name: f.default for f in dataclasses.fields(GPTConfig)}


def test_all_parts_off_is_v1():
    """The recipe without its parts is the first one; each part by itself changes the function."""
    sizes = {name: getattr(CONFIG, name) for name in SIX}
    v1 = GPTConfig(**sizes)
    off = GPTConfig.modern(**sizes, **{name: NEUTRAL[name] for name in MODERN})
    assert off == v1 and not v1.parts and set(CONFIG.parts) == set(MODERN)
    ids = np.random.default_rng(0).integers(0, 90, (2, 200))
    before = run_forward(v1, toy_params(v1), ids)
    for part in set(MODERN) - {"initialisation", "vocab_multiple"}:
        one = dataclasses.replace(v1, **{part: MODERN[part]})
        assert one.parts == (part,)
        params = toy_params(one)  # draws all parameters anew where there are more of them
        shared = {**toy_params(v1), **{name: params[name] for name in params if name not in ("wte", "h", "lm_head")}}
        if part == "value_embeds":
            shared = params
        assert np.abs(run_forward(one, shared, ids) - before).max() > 1e-3, part


@pytest.mark.parametrize("given", [None, 7])
def test_smear_stops_at_documents(given):
    """What follows bos does not depend on what comes before it in the row, but for attention: here, without it."""
    config = dataclasses.replace(CONFIG, n_layer=1, smear_across_documents=False, bos_id=given)
    bos = 90 - 9 if given is None else given
    params = toy_params(config)
    params["h"]["0"]["attn"]["c_proj"]["kernel"] *= 0
    ids = np.random.default_rng(0).integers(10, 80, (1, 12))
    ids[0, 5] = bos
    other = ids.copy()
    other[0, :5] += 1
    a, b = (np.asarray(run_forward(config, params, x)) for x in (ids, other))
    np.testing.assert_array_equal(a[0, 5:], b[0, 5:])
    across = dataclasses.replace(config, smear_across_documents=True)
    a, b = (np.asarray(run_forward(across, params, x)) for x in (ids, other))
    assert np.abs(a[0, 5] - b[0, 5]).max() > 1e-3
    np.testing.assert_array_equal(a[0, 6:], b[0, 6:])  # no further than one token


@pytest.mark.parametrize("factor", [0.3, 1.7])
def test_backout_of_the_last_layer_is_never_trained(factor):
    """With two layers the middle is the end: (1 - factor) x under a norm, and the factor's gradient rounding alone."""
    config = dataclasses.replace(CONFIG, n_layer=2, window_pattern="L")
    params = toy_params(config)
    params["backout_lambda"] = jnp.array([factor])
    ids = np.random.default_rng(0).integers(0, 90, (2, 20))
    _, grads = loss_and_gradients(config, params, ids[:, :-1], ids[:, 1:])
    assert grads["backout_lambda"] == 0
    hidden_states = jax.jit(gpt.hidden_states, static_argnums=0)
    got = hidden_states(config, params, ids)
    del params["backout_lambda"]
    expected = hidden_states(dataclasses.replace(config, backout=False), params, ids)
    np.testing.assert_allclose(got, np.sign(1 - factor) * expected, atol=1e-5)


def test_padded_entries_do_not_count():
    """The loss, its gradient and the logits ignore the columns beyond the vocabulary, whatever they hold."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(40, 8)).astype(np.float32), rng.normal(size=(8, 64)).astype(np.float32)
    targets, weights = rng.integers(0, 50, 40), rng.uniform(size=40).astype(np.float32)

    def loss(kernel, entries):
        return fused_weighted_nll(hidden, kernel, targets, weights, 15.0, None, entries)

    value, gradient = jax.value_and_grad(loss)(kernel, 50)
    expected, cropped = jax.value_and_grad(loss)(kernel[:, :50], None)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :50], cropped, atol=1e-6)
    assert not gradient[:, 50:].any()


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(n_embd=16, smear=True), "smear"),
        (dict(n_embd=8, n_head=2, n_kv_head=2, value_embeds=True), "value_embeds"),
        (dict(initialisation="mu"), "initialisation"),
        (dict(vocab_multiple=0), "vocab_multiple"),
        (dict(window_pattern="SQL"), "window_pattern"),
    ],
)
def test_parts_that_cannot_be(wrong, word):
    with pytest.raises(ValueError, match=word):
        GPTConfig(**{"sequence_len": 8, "vocab_size": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, **wrong})
