"""Penalties, biases, min_p and log-probabilities: the textbook's numbers, per row, whatever else runs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.inference import alternatives
from nanochat_jax.inference.logits import adjust
from nanochat_jax.inference.model_runner import compiled_programs
from nanochat_jax.inference.request import MAX_LOGPROBS, SamplingParams
from tests.serve_fixtures import toy_engine

V = 300
WANTED: list[dict[str, Any]] = [
    dict(frequency_penalty=1.5),
    dict(presence_penalty=-2.0),
    dict(repetition_penalty=1.7),
    dict(logit_bias=((7, 100.0), (8, -100.0))),
    dict(frequency_penalty=-0.4, presence_penalty=1.1, repetition_penalty=0.8, logit_bias=((5, 3.0),)),
    dict(),
]


def expected(logits, prompt, said, params: SamplingParams):
    """The adjusted logits, a token at a time."""
    out = logits.astype(np.float64).copy()
    for token, bias in params.logit_bias:
        out[token] += bias
    for token in range(len(out)):
        n = said.count(token)
        if n or token in prompt:
            out[token] = out[token] / params.repetition_penalty if out[token] > 0 else (
                out[token] * params.repetition_penalty
            )  # fmt: skip
        out[token] -= n * params.frequency_penalty + (n > 0) * params.presence_penalty
    return out


@pytest.fixture(scope="module")
def engine():
    made = toy_engine(slots=4)
    made._runner.batch_sizes = lambda: [4]  # one program
    return made


def table_of(engine) -> np.ndarray:
    return np.asarray(engine.params["table"])


def slow_greedy(table, prompt, params: SamplingParams) -> list[int]:
    said: list[int] = []
    while len(said) < (params.max_tokens or 0):
        last = [*prompt, *said][-1]
        said.append(int(expected(table[last % len(table)], prompt, said, params).argmax()))
    return said


def test_greedy_completions_follow_the_formula(engine):
    base = SamplingParams(20, temperature=0.0, ignore_eos=True)
    each = [dataclasses.replace(base, **wanted) for wanted in WANTED]
    prompts = [[3 * i + 1, 9, 9, 40 + i] for i in range(len(each))]
    together = [c.tokens for c in engine.generate(prompts, each)]
    assert together == [slow_greedy(table_of(engine), p, own) for p, own in zip(prompts, each, strict=True)]
    assert len({tuple(engine.generate([prompts[0]], own)[0].tokens) for own in each}) >= 4, "they all make a difference"


def test_samples_do_not_depend_on_the_batch_and_nothing_is_compiled(engine):
    each = [
        SamplingParams(15, temperature=0.9, top_k=40 * (i % 3), seed=i, min_p=0.1 * (i % 2), logprobs=n, **wanted)
        for i, (wanted, n) in enumerate(zip(WANTED, (0, None, 3, 20, None, 5), strict=True))
    ]
    prompts = [[5 + i, 6] for i in range(len(each))]
    alone = [engine.generate([p], own)[0] for p, own in zip(prompts, each, strict=True)]
    before = compiled_programs()
    assert engine.generate(prompts, each) == alone and compiled_programs() == before
    requests = [engine.submit(p, own) for p, own in zip(prompts, each, strict=True)]
    while engine.live:
        engine.step(steps=1)  # counts come from the host after every token, not from the loop
    assert [r.completion(engine.tokenizer) for r in requests] == alone
    assert [len(c.logprobs) for c in alone] == [15 if own.logprobs is not None else 0 for own in each]


def test_log_probabilities_are_the_models_whatever_is_adjusted(engine):
    params = SamplingParams(12, temperature=0.7, seed=3, logprobs=4, ignore_eos=True, **WANTED[4])
    (found,) = engine.generate([[1, 2, 3]], params)
    table = table_of(engine).astype(np.float64)
    for last, token, chance, top in zip(
        [3, *found.tokens], found.tokens, found.logprobs, found.alternatives, strict=False
    ):
        row = table[last % len(table)]
        row = row - np.log(np.exp(row).sum())
        order = np.argsort(-row)[:4]
        assert chance == pytest.approx(row[token], abs=1e-4)
        assert [i for i, _ in top] == order.tolist() and [p for _, p in top] == pytest.approx(row[order], abs=1e-4)


@pytest.mark.parametrize("vocabulary", [265, 512, 1000])
def test_alternatives_are_the_largest_each_once(vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(size=(5, vocabulary)).astype(np.float32)
    logits[1] = logits[1].round()  # many ties
    logits[2] = 0.0
    tokens = np.arange(5) * 50
    described = np.asarray(jax.jit(alternatives.describe)(jnp.asarray(logits), jnp.asarray(tokens), MAX_LOGPROBS))
    chances, top = alternatives.read(described, MAX_LOGPROBS)
    norm = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(chances, logits[np.arange(5), tokens] - norm, atol=1e-5)
    for row, own, log_sum in zip(logits, top, norm, strict=True):
        ids, values = zip(*own, strict=True)
        assert len(set(ids)) == MAX_LOGPROBS
        np.testing.assert_allclose(values, row[list(ids)] - log_sum, atol=1e-5)
        np.testing.assert_allclose(row[list(ids)], np.sort(row)[::-1][:MAX_LOGPROBS])


def test_neutral_rows_are_unchanged_to_the_bit():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, V)).astype(np.float32) * 9
    seen = rng.integers(0, 7, (3, V)).astype(np.int32)
    one, zero = np.ones(3, np.float32), np.zeros(3, np.float32)
    bias = np.zeros((3, V), np.float32)
    bias[1, 4] = 2.0
    found = np.asarray(jax.jit(adjust)(logits, bias, seen, one, zero, np.array([0, 0, 0.5], np.float32)))
    np.testing.assert_array_equal(found[0], logits[0])
    assert found[1, 4] == logits[1, 4] + 2 and np.array_equal(np.delete(found[1], 4), np.delete(logits[1], 4))
    np.testing.assert_array_equal(found[2], np.where(seen[2] > 1, logits[2] - np.float32(0.5), logits[2]))


@pytest.mark.parametrize(
    "field,value",
    [
        ("min_p", -0.1), ("min_p", 1.5), ("frequency_penalty", 2.5), ("presence_penalty", float("nan")),
        ("repetition_penalty", 0.0), ("repetition_penalty", float("inf")), ("logit_bias", ((1, float("nan")),)),
        ("logprobs", -1), ("logprobs", 21), ("prompt_logprobs", 21),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} "):
        SamplingParams(**{field: value})


def test_a_bias_for_a_token_that_there_is_not(engine):
    with pytest.raises(ValueError, match="logit_bias"):
        engine.submit([1], SamplingParams(logit_bias=((10**6, 1.0),)))
