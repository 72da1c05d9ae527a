"""Sampling: the reference's distributions, exact top-k, rows that do not see each other, no recompiles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.hardware import cpu_kernels
from nanochat_jax.inference import alternatives, sampling
from tests.tokenizer_fixtures import golden

N = 5000


@jax.jit
def draw(logits, temperature, top_k, top_p, min_p, seed, sample_index, count) -> Any:
    return sampling.sample(logits, temperature, top_k, top_p, min_p, sampling.uniforms(seed, sample_index, count))


def call(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, sample_index=0, count=0, min_p=0.0):
    """`sample` with scalars spread over the rows."""
    floats, whole = np.float32, np.int32
    settings = zip(
        (temperature, top_k, top_p, min_p, seed, sample_index, count),
        (floats, whole, floats, floats, np.uint32, whole, whole),
        strict=True,
    )
    spread = [np.broadcast_to(np.asarray(x, dtype), len(logits)).copy() for x, dtype in settings]
    return np.asarray(draw(jnp.asarray(logits, jnp.float32), *spread))


def frequencies(row, **settings):
    """Of N draws. The tests share a few lengths of the row: a program takes longer to compile than to run."""
    tokens = call(np.tile(row, (N, 1)), seed=np.arange(N), **settings)
    return np.bincount(tokens, minlength=len(row)) / N


def assert_same_distribution(measured, expected):
    np.testing.assert_array_equal(measured[expected == 0], 0)
    # five standard deviations of each frequency, plus one draw
    assert np.all(np.abs(measured - expected) <= 5 * np.sqrt(expected * (1 - expected) / N) + 1 / N)


@pytest.mark.parametrize(
    "case", golden("engine_v1")["sampling"]["cases"], ids=lambda c: f"{c['temperature']}-{c['top_k']}"
)
def test_golden_distributions(case):
    for b, row in enumerate(golden("engine_v1")["sampling"]["logits"]):
        expected = np.zeros(len(row))
        ids = case["candidate_ids"][b] if case["candidate_ids"] else np.arange(len(row))
        expected[ids] = case["probs"][b]
        measured = frequencies(np.array(row), temperature=case["temperature"], top_k=case["top_k"] or 0)
        assert_same_distribution(measured, expected)


@pytest.mark.parametrize("V,top_k", [(300, 0), (300, 64), (300, 65), (300, 299), (300, 300), (300, 10**6), (1000, 200)])
def test_large_vocabularies(V, top_k):
    row = np.random.default_rng(V + top_k).normal(size=V).astype(np.float32)
    k = V if top_k in (0, 10**6) else top_k
    kept = np.argsort(-row, kind="stable")[:k]
    expected = np.zeros(V)
    expected[kept] = np.exp(row[kept].astype(np.float64) / 0.8)
    assert_same_distribution(frequencies(row, temperature=0.8, top_k=top_k), expected / expected.sum())


@pytest.mark.parametrize("top_k", [3, 70])
def test_ties_at_the_edge_of_top_k_keep_exactly_k(top_k):
    row = np.zeros(300, np.float32)
    row[50] = 0.5
    seen = np.flatnonzero(frequencies(row, top_k=top_k))
    expected = sorted({50, *[i for i in range(300) if i != 50][: top_k - 1]})
    assert seen.tolist() == expected


@pytest.fixture
def accelerator(monkeypatch):
    """What is computed differently elsewhere is computed on this CPU as on a GPU."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, default, **_: default(*operands))


@pytest.fixture(params=["plain JAX", "kernel", "accelerator"])
def find(request):
    if request.param == "accelerator":
        request.getfixturevalue("accelerator")
        return sampling._bisect  # one operation at a time: unrolled as it is, it takes a CPU long to compile
    if request.param == "kernel" and not cpu_kernels.available("keep_largest"):
        pytest.skip("needs AVX2")
    return jax.jit(sampling._kernel if request.param == "kernel" else sampling._bisect)


@pytest.mark.parametrize("V", [200, 256, 5000])
def test_the_k_largest_are_those_that_a_stable_sort_puts_first(find, V):
    rng = np.random.default_rng(V)
    k = np.array([1, 2, 50, V - 1, V, V + 3, 7], np.int32)
    logits = rng.normal(size=(len(k), V)).astype(np.float32) * 4
    logits[1::2] = logits[1::2].round()  # many ties, 0.0 with -0.0 among them
    kept = np.full_like(logits, -np.inf)
    for row, best in enumerate(np.argsort(-logits, axis=-1, kind="stable")):
        kept[row, best[: k[row]]] = logits[row, best[: k[row]]]
    found = find(sampling.fold(jnp.asarray(logits)), jnp.asarray(k)).reshape(len(k), -1)
    np.testing.assert_array_equal(found[:, :V], kept)
    assert np.all(found[:, V:] == -np.inf)


@pytest.mark.parametrize("top_p,top_k,temperature", [(0.5, 0, 1.0), (0.9, 0, 0.7), (0.99, 40, 1.3), (1e-6, 0, 1.0)])
def test_top_p_keeps_the_smallest_set_with_that_probability(top_p, top_k, temperature):
    row = np.random.default_rng(5).normal(size=1000).astype(np.float32) * 2
    order = np.argsort(-row, kind="stable")[: top_k or None]
    chances = np.exp((row[order] - row.max()).astype(np.float64) / temperature)
    chances /= chances.sum()
    n_kept = int(np.searchsorted(np.cumsum(chances), top_p)) + 1  # sorted, the textbook way
    expected = np.zeros(1000)
    expected[order[:n_kept]] = chances[:n_kept] / chances[:n_kept].sum()
    assert_same_distribution(frequencies(row, temperature=temperature, top_k=top_k, top_p=top_p), expected)


def test_top_p_keeps_all_that_are_equally_likely():
    row = np.full(300, -50.0, np.float32)
    row[[3, 70, 299]] = 1.0
    for top_p in (0.0, 0.2, 0.9):
        assert np.flatnonzero(frequencies(row, top_p=top_p)).tolist() == [3, 70, 299]


def test_temperature_zero_is_argmax_whatever_else_is_set():
    logits = np.random.default_rng(0).normal(size=(12, 700))
    logits[3, 100] = logits[3, 7] = 9.0  # a tie: the lower id
    expected = logits.argmax(-1)
    for top_k in (0, 5, 100):
        np.testing.assert_array_equal(call(logits, temperature=0.0, top_k=top_k, seed=3), expected)
    untied = logits.copy()
    untied[3, 7] = 8.0
    np.testing.assert_array_equal(call(untied, temperature=1e-30), untied.argmax(-1))
    np.testing.assert_array_equal(call(logits, temperature=5.0, top_k=1), expected)


def test_a_row_does_not_depend_on_its_neighbours_or_place():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(12, 700)).astype(np.float32) * 3
    settings = dict(
        temperature=rng.choice([0.0, 0.5, 1.0, 1.7], 12),
        top_k=rng.choice([0, 1, 5, 50, 64, 65, 300, 5000], 12),
        top_p=rng.choice([0.0, 0.3, 0.9, 1.0], 12),
        seed=rng.integers(0, 2**32, 12),
        sample_index=rng.integers(0, 9, 12),
        count=rng.integers(0, 1000, 12),
    )
    together = call(logits, **settings)
    order = rng.permutation(12)
    np.testing.assert_array_equal(call(logits[order], **{k: v[order] for k, v in settings.items()}), together[order])
    for i in range(12):
        alone = call(logits[i : i + 1], **{k: v[i : i + 1] for k, v in settings.items()})
        assert alone[0] == together[i]


def test_seed_sample_index_and_count_each_change_the_draw():
    logits, seeds = np.zeros((N, 1000)), np.arange(N)
    base = call(logits, seed=seeds)
    assert len(set(base)) > 950
    for other in (dict(seed=seeds + 2**31), dict(seed=seeds, sample_index=1), dict(seed=seeds, count=1)):
        assert np.mean(call(logits, **other) == base) < 0.01
    np.testing.assert_array_equal(call(logits, seed=seeds), base)


def test_settings_do_not_recompile():
    logits = np.random.default_rng(0).normal(size=(12, 700))
    call(logits)
    before = draw._cache_size()
    for temperature in (0.0, 0.3, 2.0):
        for top_k in (0, 1, 64, 65, 400):
            call(logits, temperature=temperature, top_k=top_k, top_p=1.0 / (1 + top_k), seed=top_k)
    assert draw._cache_size() == before


def test_an_accelerator_draws_the_same_tokens_without_loops_and_with_one_branch(monkeypatch, request):
    rng = np.random.default_rng(2)
    logits = np.round(rng.normal(size=(12, 700)) * 3, 1).astype(np.float32)  # with ties
    settings = dict(
        temperature=rng.choice([0.0, 0.5, 1.0, 1.7], 12),
        top_k=rng.choice([0, 1, 5, 50, 64, 65, 300, 5000], 12),
        top_p=rng.choice([0.0, 0.3, 0.9, 1.0], 12),
        seed=np.arange(12),
    )
    expected = call(logits, **settings)
    request.getfixturevalue("accelerator")
    plain = draw.__wrapped__
    monkeypatch.setitem(globals(), "draw", plain)
    with jax.disable_jit():  # unrolled as it is, it takes a CPU long to compile
        np.testing.assert_array_equal(call(logits, **settings), expected)
    monkeypatch.setattr(sampling, "uniforms", lambda seed, *_: jnp.full((len(seed), 2), 0.5))
    traced = jax.make_jaxpr(lambda *args: plain(*args))  # another function: what is traced is remembered
    monkeypatch.setitem(globals(), "draw", lambda *args: traced(*args).pretty_print())
    program = str(call(logits, **settings))
    assert program.count("cond[") == 1 and "while[" not in program


@pytest.mark.parametrize("V", [300, 1024])
def test_log_probabilities_are_batch_invariant_to_the_bit(V):
    describe = jax.jit(alternatives.describe)
    logits = 3 * np.random.default_rng(V).standard_normal((64, V), np.float32)
    tokens = np.arange(64, dtype=np.int32)
    alone = [np.asarray(describe(logits[i : i + 1], tokens[i : i + 1], 0))[0] for i in range(64)]
    for n in (2, 5, 8):
        for begin in range(0, 64 - n + 1, n):
            rows = slice(begin, begin + n)
            np.testing.assert_array_equal(describe(logits[rows], tokens[rows], 0), alone[rows])
