"""The engine: the reference's token streams, its tool machine, requests that join and leave, and no recompiles."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from nanochat_jax.hardware import cpu_kernels
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.model_runner import compiled_programs
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model import gpt
from tests.fakes import FakeModel, fake_params
from tests.golden_models import golden_model
from tests.tokenizer_fixtures import golden, golden_tokenizer

CASES = golden("engine_v1")
BOS, V = golden_tokenizer().bos_id, golden_tokenizer().vocab_size
ENDS = {BOS, golden_tokenizer().encode_special("<|assistant_end|>")}
BOTH = [*CASES["greedy"], *CASES["scripted"]]
CAPACITY = max(256, *(len(case["prompt_tokens"]) + case["max_tokens"] for case in BOTH))
SCRIPTS = max(case["num_samples"] for case in CASES["scripted"])


@pytest.fixture(scope="module")
def tiny():
    """(config, params) of the golden model, with positions enough for every test."""
    config, params = golden_model()
    return dataclasses.replace(config, sequence_len=max(64, CAPACITY // 10)), params


@pytest.fixture(scope="module")
def engine(tiny):
    """One engine for most tests: its programs are compiled once."""
    return Engine(tiny[0], tiny[1], golden_tokenizer(), slots=4, capacity=CAPACITY, steps_per_call=8)


@pytest.fixture(autouse=True)
def idle(request):
    yield
    if "engine" in request.fixturenames:
        assert request.getfixturevalue("engine").live == 0, "a test left requests behind"


def samples(engine, prompt, n, *settings, **more):
    """Completions of one prompt, which differ in their sample_index."""
    params = SamplingParams(*settings, **more)
    return engine.generate([prompt] * n, [dataclasses.replace(params, sample_index=i) for i in range(n)])


def tokens_of(completions):
    return [completion.tokens for completion in completions]


def reference_columns(engine, prompt, n, max_tokens):
    """(token_columns, token_masks), greedily, as the reference's `generate` yields them: all rows go on until each has
    produced an end token."""
    rows = samples(engine, prompt, n, max_tokens, temperature=0.0, ignore_eos=True)
    length = max(next((i + 1 for i, token in enumerate(r.tokens) if token in ENDS), max_tokens) for r in rows)
    return tuple([list(c) for c in zip(*kind, strict=True)][:length] for kind in
                 ([r.tokens for r in rows], [r.masks for r in rows]))  # fmt: skip


def reference_batch(engine, prompt, n, max_tokens):
    """(results, masks) as the reference's `generate_batch` returns them: with the prompt, without the end token."""
    rows = samples(engine, prompt, n, max_tokens, temperature=0.0)
    lengths = [len(r.tokens) - (r.finish_reason == "end") for r in rows]
    return (
        [prompt + r.tokens[:length] for r, length in zip(rows, lengths, strict=True)],
        [[0] * len(prompt) + r.masks[:length] for r, length in zip(rows, lengths, strict=True)],
    )


full_forward = jax.jit(gpt.forward, static_argnums=0)


def most_likely(config, params, ids, length=128):
    """argmax at every position of ids from the uncached forward, padded to one length to compile it once."""
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(full_forward(config, params, padded))[0].argmax(-1)[: len(ids)].tolist()


def drain(engine, requests):
    while any(r.finished is None for r in requests):
        engine.step()
    return [r.tokens for r in requests]


# --- the reference's numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["greedy"], ids=lambda c: f"{c['num_samples']}x{c['max_tokens']}")
def test_golden_greedy_streams(engine, case):
    prompt, n, limit = case["prompt_tokens"], case["num_samples"], case["max_tokens"]
    tokens, masks = reference_columns(engine, prompt, n, limit)
    assert case["temperature"] == 0 and tokens == case["token_columns"] and masks == case["token_masks"]
    results, result_masks = reference_batch(engine, prompt, n, limit)
    assert results == case["generate_batch_results"] and result_masks == case["generate_batch_masks"]
    assert [c[0] for c in tokens] == case["naive_generate_tokens"][: len(tokens)]


def script_of(case):
    """The golden script as a `FakeModel`'s parameters: row r of the batch follows script r.

    The reference's prefill has one row, so its first column comes from script 0 for every row; here every row samples
    its own first token, so the scripts are given with that token already shared.
    """
    longest = max(map(len, case["script_tokens"]))
    table = np.full((SCRIPTS, longest + 1), case["filler_token"], np.int32)  # whose end is repeated
    for row, script in enumerate(case["script_tokens"]):
        table[row, : len(script)] = [case["script_tokens"][0][0], *script[1:]]
    return fake_params(script=table, first=len(case["prompt_tokens"]) - 1)


@pytest.mark.parametrize("steps", [1, 16])
@pytest.mark.parametrize("case", CASES["scripted"], ids=lambda c: c["name"])
def test_golden_tool_machine(tiny, case, steps):
    config, tokenizer, params = dataclasses.replace(tiny[0], n_layer=1), golden_tokenizer(), script_of(case)

    def scripted():
        """Scripts go by row, so row, slot and request must be one: a new engine, all of whose slots are decoded."""
        made = Engine(
            config, params, tokenizer, slots=SCRIPTS, capacity=CAPACITY, steps_per_call=steps, model=FakeModel
        )
        made._runner.batch_sizes = lambda: [SCRIPTS]
        return made

    prompt, n, limit = case["prompt_tokens"], case["num_samples"], case["max_tokens"]
    tokens, masks = reference_columns(scripted(), prompt, n, limit)
    assert tokens == case["token_columns"] and masks == case["token_masks"]
    results, result_masks = reference_batch(scripted(), prompt, n, limit)
    assert results == case["generate_batch_results"] and result_masks == case["generate_batch_masks"]
    assert [tokenizer.decode(r[len(prompt) :]) for r in results] == case["decoded"]


# --- independence ---------------------------------------------------------------------------------


def test_greedy_equals_argmax_of_the_full_forward(tiny, engine):
    config, params = tiny
    prompts = [[BOS, 5, 9], [BOS] + list(range(40, 90)), [77]]
    requests = [engine.submit(p, SamplingParams(30, temperature=0.0, ignore_eos=True)) for p in prompts]
    drain(engine, requests)
    for request in requests:
        expected = most_likely(config, params, request.prompt + request.tokens)
        assert request.tokens == expected[len(request.prompt) - 1 : -1]


def test_a_request_gives_the_same_tokens_alone_and_in_a_crowd(tiny, engine):
    settings = [SamplingParams(40, 0.9, seed=seed, ignore_eos=True) for seed in range(3)]
    settings.append(SamplingParams(40, 1.2, top_k=5, seed=9, sample_index=2, ignore_eos=True))
    prompts = [[BOS, 7], [BOS, 8, 9, 10], [BOS] + [33] * 60, [3]]
    alone = [drain(engine, [engine.submit(prompt, own)])[0] for prompt, own in zip(prompts, settings, strict=True)]
    # now with twice as many requests as slots, submitted at odd moments and in another order
    others = [
        engine.submit([BOS, 200 + i], SamplingParams(3 + 5 * i, temperature=1.0, seed=i, ignore_eos=True))
        for i in range(4)
    ]
    requests = []
    for i in (3, 1, 0, 2):
        engine.step()
        requests.append(engine.submit(prompts[i], settings[i]))
    together = drain(engine, requests)
    drain(engine, others)
    assert together == [alone[i] for i in (3, 1, 0, 2)]


@pytest.mark.slow
@pytest.mark.skipif(cpu_kernels.skinny_rows() < 8, reason="needs AVX2: XLA's rounding depends on the rows")
def test_results_are_batch_invariant_to_the_bit():
    """At a width where XLA would sum one row and several in different orders."""
    config = gpt.GPTConfig(sequence_len=64, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=256)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape, np.float32) * 0.05, gpt.abstract(config))
    engine = Engine(config, params, None, slots=8)

    def ask(i):
        return engine.submit([7 + i, 5, 9 * i], SamplingParams(12, temperature=0.9, seed=i, logprobs=0))

    alone = []
    for i in range(8):
        request = ask(i)
        drain(engine, [request])
        alone.append((request.tokens, request.logprobs))
    for n in (2, 5, 8):
        together = [ask(i) for i in range(n)]
        drain(engine, together)
        assert [(r.tokens, r.logprobs) for r in together] == alone[:n]


def test_steps_per_call_and_slots_do_not_change_the_tokens(tiny, engine):
    small = Engine(tiny[0], tiny[1], golden_tokenizer(), slots=1, capacity=33, steps_per_call=3)
    settings: dict[str, Any] = dict(n=4, max_tokens=30, top_k=50, seed=7)
    assert samples(small, [BOS, 12, 13], **settings) == samples(engine, [BOS, 12, 13], **settings)


def test_every_row_samples_its_own_first_token(engine):
    """The reference's v1 shares it among all samples; that defect is not reproduced."""
    firsts = set()
    for seed in range(4):
        firsts.add(len({c.tokens[0] for c in samples(engine, [BOS, 40], 4, max_tokens=3, seed=seed)}))
    assert max(firsts) > 2


def test_samples_do_not_depend_on_how_many_there_are(engine):
    def ask(n, seed):
        return tokens_of(samples(engine, [BOS, 50, 51], n, 20, seed=seed))

    (one,), six = ask(1, 3), ask(6, 3)  # more than slots
    assert six[0] == one and len({tuple(r) for r in six}) > 1
    assert ask(6, 3) == six
    assert ask(1, 4) != [one] and ask(1, 3 - 2**40) == [one]


def test_generate_gives_completions_in_order_and_says_when_each_ends(engine):
    tokenizer, prompts = golden_tokenizer(), [[BOS, i] for i in range(9)]
    params = [SamplingParams(20 - 2 * i, seed=i) for i in range(9)]
    seen = {}
    completions = engine.generate(prompts, params, on_finished=lambda i, c: seen.update({i: c}))
    assert completions == [seen[i] for i in range(9)] and list(seen) != sorted(seen)
    for prompt, own, c in zip(prompts, params, completions, strict=True):
        assert c.prompt == prompt and (c.finish_reason == "end") == (c.tokens[-1] in ENDS)
        assert c.finish_reason == "end" or len(c.tokens) == own.max_tokens == len(c.masks)
        assert c.text == tokenizer.decode(c.tokens[:-1] if c.finish_reason == "end" else c.tokens)

    def fails(index, completion):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.generate(prompts, SamplingParams(20), on_finished=fails)
    with pytest.raises(ValueError, match="vocabulary"):
        engine.generate([*prompts, [V]])
    assert engine.live == 0 and engine.generate([]) == []


def test_a_stop_string_ends_a_completion_at_its_last_token(engine):
    params = [SamplingParams(60, seed=seed, ignore_eos=True) for seed in range(20)]
    completions = engine.generate([[BOS, 77]] * 20, params)
    texts = [completion.text.split("<|")[0] for completion in completions]  # before the first special token
    free, own, text = next(found for found in zip(completions, params, texts, strict=True) if len(found[2]) > 6)
    stop = text[3:6]
    (stopped,) = engine.generate([[BOS, 77]], dataclasses.replace(own, stop=("never said", stop)))
    assert stopped.finish_reason == "stop" and stopped.text == text[: text.index(stop)]
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    decode = golden_tokenizer().decode
    assert stop in decode(stopped.tokens) and stop not in decode(stopped.tokens[:-1])


# --- slots, limits, life --------------------------------------------------------------------------


def test_requests_wait_join_and_leave(engine):
    requests = [engine.submit([BOS, i], SamplingParams(4 + i, temperature=0.0, ignore_eos=True)) for i in range(9)]
    assert engine.live == 9
    finished = []
    while engine.live:
        for event in engine.step():
            assert len(event.tokens) == len(event.masks) > 0
            if event.finished:
                finished.append(event.request.number - requests[0].number)
    assert sorted(finished) == list(range(9)) and finished[0] == 0
    assert [len(r.tokens) for r in requests] == [4 + i for i in range(9)]
    assert {r.finished for r in requests} == {"length"}


def test_cancel_frees_the_slot_and_the_queue(engine):
    running = [engine.submit([BOS, i], SamplingParams(200, temperature=0.0, ignore_eos=True)) for i in range(4)]
    waiting = [engine.submit([BOS, 9], SamplingParams(5, temperature=0.0, ignore_eos=True)) for _ in range(2)]
    engine.step()
    assert not waiting[1].tokens
    engine.cancel(running[2])
    engine.cancel(waiting[0])
    engine.step()
    assert len(waiting[1].tokens) == 5 and not waiting[0].tokens
    kept = len(running[2].tokens)
    for request in running:
        engine.cancel(request)
    engine.step()
    assert len(running[2].tokens) == kept and {r.finished for r in running} == {"cancelled"}


def test_a_slot_can_be_filled_to_its_last_position(tiny):
    config, params = tiny
    small = Engine(config, params, None, slots=1, capacity=33, steps_per_call=3)
    for length in (1, 17, 33):
        prompt = list(range(100, 100 + length))
        request = small.submit(prompt, SamplingParams(temperature=0.0))
        drain(small, [request])
        assert len(request.tokens) == 34 - length and request.finished == "length"
        assert request.tokens[-1] == most_likely(config, params, prompt + request.tokens[:-1])[-1]


@pytest.mark.slow
def test_prompts_longer_than_a_chunk(tiny):
    config, params = dataclasses.replace(tiny[0], sequence_len=1200), tiny[1]
    long = Engine(config, params, None, slots=2, capacity=1200, steps_per_call=4)
    prompt = np.random.default_rng(0).integers(0, 256, 1100).tolist()
    short = long.submit([5, 6], SamplingParams(12, temperature=0.0))
    request = long.submit(prompt, SamplingParams(4, temperature=0.0))
    copy = long.submit(prompt, SamplingParams(4, temperature=0.0))
    drain(long, [request, short, copy])
    expected = most_likely(config, params, prompt + request.tokens, length=1104)
    assert request.tokens == expected[1099:1103] == copy.tokens
    undisturbed = most_likely(config, params, [5, 6, *short.tokens], length=1104)  # by a neighbour's chunks
    assert short.tokens == undisturbed[1:-1]


def test_bad_requests_say_what_is_wrong(tiny, engine):
    for arguments, message in [
        (dict(tokens=[]), "empty"),
        (dict(tokens=["a"]), "list of token ids"),
        (dict(tokens="ab"), "list of token ids"),
        (dict(tokens=[V]), f"0 to {V - 1}"),
        (dict(tokens=[1] * (CAPACITY + 1)), f"{CAPACITY + 1} tokens.*{CAPACITY}"),
        (dict(tokens=[1] * 200, params=SamplingParams(CAPACITY)), f"max_tokens={CAPACITY}.*{CAPACITY - 199}"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(**arguments)
    with pytest.raises(ValueError, match="stop"):
        Engine(tiny[0], tiny[1], None, slots=1).submit([1], SamplingParams(stop=("a",)))
    most = 10 * tiny[0].sequence_len
    with pytest.raises(ValueError, match=f"capacity.*{most}"):
        Engine(tiny[0], tiny[1], None, capacity=most + 1)
    assert samples(engine, [1], 1, 3, top_k=0) == samples(engine, [1], 1, 3, top_k=V)
    assert samples(engine, [1], 1, 3, top_k=10**12) == samples(engine, [1], 1, 3)


@pytest.mark.parametrize(
    "field,value",
    [
        ("max_tokens", 0),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -2),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("stop", "a"),
        ("stop", ("a", "")),
        ("sample_index", -1),
    ],
)
def test_settings_that_cannot_work_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} "):
        SamplingParams(**{field: value})


def test_parameters_can_be_swapped_between_requests(tiny, engine):
    config, params = tiny
    greedy = SamplingParams(10, temperature=0.0)
    first = engine.generate([[BOS, 1]], greedy)
    before = compiled_programs()
    engine.params = {**params, "lm_head": jax.tree.map(lambda x: -x, params["lm_head"])}
    second = engine.generate([[BOS, 1]], greedy)
    request = engine.submit([BOS, 1], SamplingParams(10))
    with pytest.raises(RuntimeError, match="while requests run"):
        engine.params = params
    engine.cancel(request)
    engine.step()
    engine.params = params
    assert engine.generate([[BOS, 1]], greedy) == first != second
    assert compiled_programs() == before


def test_nothing_is_compiled_after_warm_up(tiny):
    """Which programs there are depends on lengths and rows only, so a model that compiles quickly shows it too."""
    params, capacity = script_of(CASES["scripted"][0]), 100
    warm = Engine(tiny[0], params, golden_tokenizer(), slots=3, capacity=capacity, steps_per_call=4, model=FakeModel)
    assert warm.warm_up() > 0
    before, rng, requests = compiled_programs(), np.random.default_rng(0), []
    for seed in range(50):
        prompt = rng.integers(0, V, rng.integers(1, capacity)).tolist()
        length, temperature, top_k = min(5, capacity + 1 - len(prompt)), rng.choice([0.0, 0.7]), rng.integers(600)
        own = SamplingParams(length, float(temperature), top_k=int(top_k), seed=seed)
        requests.append(warm.submit(prompt, own))
    drain(warm, requests)
    samples(warm, [BOS, 4], 5, 20)
    assert compiled_programs() == before


def test_the_storage_is_donated_and_never_copied(engine):
    old = engine._runner.storage
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(old)]
    samples(engine, [1, 2, 3], 2, 9)
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(engine._runner.storage)] == pointers


def test_log_probabilities_are_those_of_the_full_forward(tiny):
    engine = Engine(tiny[0], tiny[1], golden_tokenizer(), slots=4, capacity=256, steps_per_call=8)
    prompt = CASES["greedy"][0]["prompt_tokens"]
    # different temperatures and lengths: the log-probabilities are the model's, not those of the sampling distribution
    requests = [
        engine.submit(
            prompt,
            SamplingParams(9 + 3 * i, 0.5 + i, top_k=20 * i, seed=i, sample_index=i, ignore_eos=True, logprobs=0),
        )
        for i in range(3)
    ]
    drain(engine, requests)
    for r in requests:
        ids = np.zeros((1, 128), np.int32)
        ids[0, : len(prompt) + len(r.tokens)] = prompt + r.tokens
        logp = np.asarray(jax.nn.log_softmax(full_forward(*tiny, ids)))[0]
        expected = [logp[len(prompt) - 1 + i, token] for i, token in enumerate(r.tokens)]
        np.testing.assert_allclose(r.logprobs, expected, atol=2e-4)
