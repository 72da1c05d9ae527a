"""The batched scorer against one plain forward pass per prompt."""

import math

import jax
import numpy as np
import pytest

from nanochat_jax.evals import scorer as scoring
from nanochat_jax.evals.scorer import Scorer, row_length, suffix_length
from nanochat_jax.model import gpt
from nanochat_jax.parallel import sharding
from tests.toy_params import toy_params

CONFIG = gpt.GPTConfig(sequence_len=64, vocab_size=520, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
PARAMS = toy_params(CONFIG)  # at most 640 positions


forward = jax.jit(lambda params, ids: gpt.forward(CONFIG, params, ids)[0])


def logits_of(ids, params=PARAMS) -> np.ndarray:
    """Softcapped logits (T, V), float64, of a forward pass over one prompt (padded, to compile it only once)."""
    length = 256 if len(ids) <= 256 else 640
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(forward(params, padded), np.float64)[: len(ids)]


def slow(ids, start: int, end: int, params=PARAMS):
    """(nll, whether each is the first choice) of ids[start:end]."""
    logits = logits_of(ids, params)[start - 1 : end - 1]
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(end - start), ids[start:end]]
    return nll, logits.argmax(-1) == np.asarray(ids[start:end])


def some_items(seed: int):
    """Spans of every sort: behind long shared beginnings, inside them, alone, empty, in identical prompts, foretold."""
    rng = np.random.default_rng(seed)

    def draw(n):
        return rng.integers(0, CONFIG.vocab_size, n)

    items = []
    for n, sizes in ((200, (1, 1, 1)), (240, (9, 2, 9, 14)), (180, (40, 3)), (150, (0, 5))):
        beginning = draw(n)
        rows = [np.concatenate([beginning, draw(k)]) for k in sizes]
        items += [(row, n - 2, len(row)) for row in rows]
    items += [items[3], items[3], (items[3][0], 17, 30)]
    for n in (2, 2, 30, 30, 63, 64, 65, 66):
        items.append((draw(n), 1, n))
    items += [(draw(20), 7, 7), (draw(20), 7, 12)]
    for n in (40, 170):
        ids = draw(n)
        items.append((np.append(ids, logits_of(ids)[-1].argmax()), n, n + 1))
    return items


def scorer_of(**more) -> Scorer:
    return Scorer(CONFIG, PARAMS, max_tokens_per_batch=512, **more)


def test_lengths_of_rows():
    sizes = [row_length(n) for n in range(1, 3000)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072]
    assert [suffix_length(n) for n in (0, 1, 16, 17, 64, 65, 256, 257)] == [0, 16, 16, 64, 64, 256, 256, 1024]


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_spans_and_choices_equal_one_forward_pass_each(devices):
    mesh = None if devices == 1 else sharding.make_mesh(jax.devices()[:devices])
    scorer = scorer_of(mesh=mesh)
    items = some_items(0)
    progress = []
    got = scorer.spans(items, lambda done, total: progress.append((done, total)))
    assert progress == sorted(progress) and progress[-1][0] == progress[-1][1]
    for (ids, start, end), (mean, greedy, nll) in zip(items, got, strict=True):
        expected, first_choice = slow(ids, start, end)
        np.testing.assert_allclose(nll, expected, atol=3e-5)
        assert greedy == bool(first_choice.all())
        assert math.isnan(mean) if start == end else mean == pytest.approx(expected.mean(), abs=3e-5)
    assert sum(greedy for _, greedy, _ in got) >= 2, "else the flag is not tested"

    prompts, letters = [ids for ids, _, _ in items], [list(range(i % 6 + 1)) for i in range(len(items))]
    for ids, own, logits in zip(prompts, letters, scorer.choices(prompts, letters), strict=True):
        np.testing.assert_allclose(logits, logits_of(ids)[-1, own], atol=3e-5)


def test_identical_options_tie_exactly():
    """The reference then takes the first; a difference in the last bit would take another."""
    beginning, a, b = (np.random.default_rng(n).integers(0, 520, n) for n in (200, 9, 12))
    options = [np.append(beginning, x) for x in (a, b, a)]
    got = scorer_of().spans([(ids, 200, len(ids)) for ids in options])
    assert got[0][0] == got[2][0] != got[1][0]


def test_beginnings_are_run_once():
    scorer = scorer_of()
    rng = np.random.default_rng(1)
    beginning = rng.integers(0, 520, 200)
    items = [(np.append(beginning, rng.integers(0, 520, 5)), 200, 205) for _ in range(4)]
    scorer.spans(items)
    assert scorer.stats.tokens_given == 4 * 204
    assert scorer.stats.tokens_run == 200 + 4 * 4
    one_token = [(np.append(beginning, i), 200, 201) for i in range(4)]
    scorer.spans(one_token)
    assert scorer.stats.tokens_run == 200 + 4 * 4 + 200, "options of one token need no pass of their own"


def test_a_beginning_of_more_options_than_one_group_holds():
    rng = np.random.default_rng(2)
    beginning = rng.integers(0, 520, 180)
    items = [(np.append(beginning, rng.integers(0, 520, 3)), 180, 183) for _ in range(scoring.MAX_SUFFIXES + 3)]
    got = scorer_of().spans(items)
    for i in (0, scoring.MAX_SUFFIXES - 1, scoring.MAX_SUFFIXES, scoring.MAX_SUFFIXES + 2):
        np.testing.assert_allclose(got[i][2], slow(*items[i])[0], atol=3e-5)


def test_nothing_is_compiled_after_the_first_pass_and_params_can_be_swapped():
    scorer = scorer_of()
    scorer.spans(some_items(3))
    scorer.choices([[1, 2, 3]], [[4, 5]])
    compiled = scorer.compiled_programs()
    assert compiled > 3
    items = some_items(4)
    before = scorer.spans(items)
    scorer.params = jax.tree.map(lambda x: x * 1.5, PARAMS)
    after = scorer.spans(items)
    scorer.choices([[7] * 40, [8, 9]], [[4, 5, 6], [1]])
    assert scorer.compiled_programs() == compiled
    np.testing.assert_allclose(after[0][2], slow(*items[0], scorer.params)[0], atol=3e-5)
    assert abs(after[0][0] - before[0][0]) > 1e-3


def test_long_prompts_lose_their_first_tokens_and_are_counted():
    scorer = scorer_of()
    ids = np.random.default_rng(5).integers(0, 520, 700)
    (_, _, nll), (_, _, cut) = scorer.spans([(ids, 690, 700), (ids, 40, 700)])
    np.testing.assert_allclose(nll, slow(ids[-640:], 630, 640)[0], atol=3e-5)
    assert len(cut) == 639, "of a span that is cut itself, what remains is scored"
    assert scorer.stats.cropped == 2
    scorer.choices([ids], [[1, 2]])
    assert scorer.stats.cropped == 3


def test_what_cannot_be_scored_is_refused():
    scorer = scorer_of()
    assert scorer.spans([]) == [] and scorer.choices([], []) == []
    for start, end in ((0, 2), (3, 2), (1, 4)):
        with pytest.raises(ValueError, match="1 <= start <= end <= 3"):
            scorer.spans([([1, 2, 3], start, end)])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        scorer.choices([[1], []], [[1], [2]])
    with pytest.raises(ValueError, match="2 prompts need as many"):
        scorer.choices([[1], [2]], [[1]])
    with pytest.raises(ValueError, match="max_tokens_per_batch"):
        Scorer(CONFIG, PARAMS, max_tokens_per_batch=-1)
