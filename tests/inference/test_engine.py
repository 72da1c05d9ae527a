"""The engine: the reference's token streams, its tool machine, requests that join and leave, and no recompiles."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.convert.params_reference import params_from_reference
from nanochat_jax.hardware import cpu_kernels
from nanochat_jax.inference.decode import compiled_programs
from nanochat_jax.inference.engine import Engine
from nanochat_jax.model import gpt
from tests.tokenizer_fixtures import GOLDEN, golden, golden_tokenizer

CASES = golden("engine_v1")


@pytest.fixture(scope="module")
def tiny():
    """(config, params) of the golden files' model, whose vocabulary is the golden tokenizer's."""
    with np.load(GOLDEN / "tokmodel_v1.npz") as arrays:
        sizes: dict[str, Any] = {k.split("/")[1]: int(arrays[k]) for k in arrays if k.startswith("config/")}
        config = gpt.GPTConfig(**sizes)
        names = [k for k in arrays if k.startswith("param/")]
        return config, params_from_reference(config, {k.removeprefix("param/"): arrays[k] for k in names})


@pytest.fixture(scope="module")
def engine(tiny):
    """One engine for most tests: its programs are compiled once."""
    return Engine(tiny[0], tiny[1], golden_tokenizer(), slots=4, capacity=256, steps_per_call=8)


@pytest.fixture(autouse=True)
def idle(request):
    yield
    if "engine" in request.fixturenames:
        assert request.getfixturevalue("engine").live == 0, "a test left requests behind"


def columns(stream):
    return [list(x) for x in zip(*stream, strict=True)] or [[], []]


full_forward = jax.jit(gpt.forward, static_argnums=0)


def likeliest(config, params, ids, length=128):
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
    tokens, masks = columns(engine.generate(prompt, num_samples=n, max_tokens=limit, temperature=case["temperature"]))
    assert tokens == case["token_columns"] and masks == case["token_masks"]
    results, result_masks = engine.generate_batch(prompt, num_samples=n, max_tokens=limit, temperature=0.0)
    assert results == case["generate_batch_results"] and result_masks == case["generate_batch_masks"]
    assert [c[0] for c in tokens] == case["naive_generate_tokens"][: len(tokens)]


class ScriptedModel:
    """A model whose most likely token is the golden script's: row r of the batch follows script r.

    The script is its parameters, so one compiled program serves all cases.
    """

    @staticmethod
    def params(case):
        # The reference's prefill has one row, so its first column comes from script 0 for every row; here every row
        # samples its own first token, so the scripts are given with that token already shared.
        table = np.full((4, 200), case["filler_token"], np.int32)
        for row, script in enumerate(case["script_tokens"]):
            table[row, : len(script)] = [case["script_tokens"][0][0], *script[1:]]
        return {"table": jnp.asarray(table), "first": jnp.asarray(len(case["prompt_tokens"]) - 1)}

    @staticmethod
    def forward_cached(config, params, ids, cache):
        rows, T = ids.shape
        if T > 1:  # a prefill chunk: nothing is sampled from it
            return jnp.zeros((rows, T, config.vocab_size)), cache
        wanted = params["table"][jnp.arange(rows), cache.position - params["first"]]
        return jax.nn.one_hot(wanted, config.vocab_size)[:, None], cache

    @staticmethod
    def unembed(config, params, hidden):
        return hidden * 9.0


@pytest.mark.parametrize("steps", [1, 16])
@pytest.mark.parametrize("case", CASES["scripted"], ids=lambda c: c["name"])
def test_golden_tool_machine(tiny, case, steps):
    config, tokenizer = dataclasses.replace(tiny[0], n_layer=1, compute_dtype="float32"), golden_tokenizer()
    params = ScriptedModel.params(case)

    def scripted():
        """Scripts go by row, so row, slot and request must be one: a new engine, all of whose slots are decoded."""
        made = Engine(config, params, tokenizer, slots=4, capacity=128, steps_per_call=steps, model=ScriptedModel)
        made._programs.batch_sizes = lambda: [4]
        return made

    prompt, n, limit = case["prompt_tokens"], case["num_samples"], case["max_tokens"]
    tokens, masks = columns(scripted().generate(prompt, num_samples=n, max_tokens=limit, temperature=0.0))
    assert tokens == case["token_columns"] and masks == case["token_masks"]
    results, result_masks = scripted().generate_batch(prompt, num_samples=n, max_tokens=limit, temperature=0.0)
    assert results == case["generate_batch_results"] and result_masks == case["generate_batch_masks"]
    assert [tokenizer.decode(r[len(prompt) :]) for r in results] == case["decoded"]


# --- independence ---------------------------------------------------------------------------------


def test_greedy_equals_argmax_of_the_full_forward(tiny, engine):
    config, params = tiny
    prompts = [[511, 5, 9], [511] + list(range(40, 90)), [77]]
    requests = [engine.submit(p, 30, temperature=0.0, run_on=True) for p in prompts]
    drain(engine, requests)
    for request in requests:
        expected = likeliest(config, params, request.prompt + request.tokens)
        assert request.tokens == expected[len(request.prompt) - 1 : -1]


def test_a_request_gives_the_same_tokens_alone_and_in_a_crowd(tiny, engine):
    settings = [dict(temperature=0.9, seed=s) for s in range(3)] + [dict(temperature=1.2, top_k=5, seed=9, stream=2)]
    prompts = [[511, 7], [511, 8, 9, 10], [511] + [33] * 60, [3]]
    alone = []
    for prompt, setting in zip(prompts, settings, strict=True):
        alone += drain(engine, [engine.submit(prompt, 40, run_on=True, **setting)])
    # now with twice as many requests as slots, submitted at odd moments and in another order
    others = [engine.submit([511, 400 + i], 3 + 5 * i, temperature=1.0, seed=i, run_on=True) for i in range(4)]
    requests = []
    for i in (3, 1, 0, 2):
        engine.step()
        requests.append(engine.submit(prompts[i], 40, run_on=True, **settings[i]))
    together = drain(engine, requests)
    drain(engine, others)
    assert together == [alone[i] for i in (3, 1, 0, 2)]


@pytest.mark.slow
@pytest.mark.skipif(cpu_kernels.skinny_rows() < 8, reason="needs AVX2: XLA's rounding depends on the rows")
def test_what_a_row_becomes_does_not_depend_on_its_company_to_the_bit():
    """At a width where XLA would sum one row and several in different orders."""
    config = gpt.GPTConfig(sequence_len=64, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=256)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape, np.float32) * 0.05, gpt.abstract(config))
    engine = Engine(config, params, None, slots=8, logprobs=True)

    def ask(i):
        return engine.submit([7 + i, 5, 9 * i], 12, temperature=0.9, seed=i)

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
    settings: dict[str, Any] = dict(num_samples=4, max_tokens=30, temperature=1.0, top_k=50, seed=7)
    assert small.generate_batch([511, 12, 13], **settings) == engine.generate_batch([511, 12, 13], **settings)


def test_every_row_samples_its_own_first_token(engine):
    """The reference's v1 shares it among all samples; that defect is not reproduced."""
    firsts = set()
    for seed in range(4):
        tokens, _ = next(iter(engine.generate([511, 40], num_samples=4, max_tokens=3, seed=seed)))
        firsts.add(len(set(tokens)))
    assert max(firsts) > 2


def test_samples_do_not_depend_on_how_many_there_are(engine):
    one, _ = engine.generate_batch([511, 50, 51], num_samples=1, max_tokens=20, seed=3)
    six, _ = engine.generate_batch([511, 50, 51], num_samples=6, max_tokens=20, seed=3)  # more than slots
    assert six[0] == one[0] and len({tuple(r) for r in six}) > 1
    assert engine.generate_batch([511, 50, 51], num_samples=6, max_tokens=20, seed=3)[0] == six
    assert engine.generate_batch([511, 50, 51], num_samples=1, max_tokens=20, seed=4)[0] != one
    assert engine.generate_batch([511, 50, 51], num_samples=1, max_tokens=20, seed=3 - 2**40)[0] == one


def test_generate_and_generate_batch_agree(engine):
    settings = dict(num_samples=3, max_tokens=60, temperature=1.3, seed=11)
    results, masks = engine.generate_batch([511, 60], **settings)
    tokens, token_masks = columns(engine.generate([511, 60], **settings))
    ends = {515, 511}
    for row in range(3):
        answer = [c[row] for c in tokens]
        stop = next((i for i, t in enumerate(answer) if t in ends), len(answer))
        assert results[row] == [511, 60] + answer[:stop]
        assert masks[row] == [0, 0] + [c[row] for c in token_masks][:stop]


# --- slots, limits, life --------------------------------------------------------------------------


def test_requests_wait_join_and_leave(engine):
    requests = [engine.submit([511, i], 4 + i, temperature=0.0, run_on=True) for i in range(9)]
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
    running = [engine.submit([511, i], 200, temperature=0.0, run_on=True) for i in range(4)]
    waiting = [engine.submit([511, 9], 5, temperature=0.0, run_on=True) for _ in range(2)]
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


def test_closing_generate_cancels_its_rows(engine):
    stream = engine.generate([511, 3], num_samples=2, max_tokens=100)
    next(stream)
    assert engine.live == 2
    stream.close()
    assert engine.live == 0


def test_a_slot_can_be_filled_to_its_last_position(tiny):
    config, params = tiny
    small = Engine(config, params, None, slots=1, capacity=33, steps_per_call=3)
    for length in (1, 17, 33):
        prompt = list(range(100, 100 + length))
        request = small.submit(prompt, temperature=0.0)
        drain(small, [request])
        assert len(request.tokens) == 34 - length and request.finished == "length"
        assert request.tokens[-1] == likeliest(config, params, prompt + request.tokens[:-1])[-1]


@pytest.mark.slow
def test_prompts_longer_than_a_chunk(tiny):
    config, params = dataclasses.replace(tiny[0], sequence_len=1200), tiny[1]
    long = Engine(config, params, None, slots=2, capacity=1200, steps_per_call=4)
    prompt = np.random.default_rng(0).integers(0, 500, 1100).tolist()
    short = long.submit([5, 6], 12, temperature=0.0)
    request = long.submit(prompt, 4, temperature=0.0)
    copy = long.submit(prompt, 4, temperature=0.0)
    drain(long, [request, short, copy])
    expected = likeliest(config, params, prompt + request.tokens, length=1104)
    assert request.tokens == expected[1099:1103] == copy.tokens
    assert (
        short.tokens == likeliest(config, params, [5, 6, *short.tokens], length=1104)[1:-1]
    )  # prefilling a neighbour in chunks did not disturb it


def test_bad_requests_say_what_is_wrong(tiny, engine):
    for arguments, message in [
        (dict(tokens=[]), "empty"),
        (dict(tokens=["a"]), "list of token ids"),
        (dict(tokens="ab"), "list of token ids"),
        (dict(tokens=[520]), "vocabulary has 0 to 519"),
        (dict(tokens=[1], temperature=-1), "temperature.*-1"),
        (dict(tokens=[1], temperature=float("nan")), "temperature"),
        (dict(tokens=[1], top_k=-2), "top_k.*-2"),
        (dict(tokens=[1], max_tokens=-1), "max_tokens.*-1"),
        (dict(tokens=[1] * 257), "257 tokens.*256"),
        (dict(tokens=[1] * 200, max_tokens=58), "200 tokens and max_tokens=58.*256.*at most 57"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(**arguments)
    with pytest.raises(ValueError, match="num_samples.*4 slots, got 5"):
        engine.generate([1], num_samples=5)
    with pytest.raises(ValueError, match="capacity.*640"):
        Engine(tiny[0], tiny[1], None, capacity=641)
    assert columns(engine.generate([1], max_tokens=0)) == [[], []]
    assert engine.generate_batch([1, 2], max_tokens=0) == ([[1, 2]], [[0, 0]])
    assert engine.generate_batch([1], max_tokens=3, top_k=0) == engine.generate_batch([1], max_tokens=3, top_k=520)
    assert engine.generate_batch([1], max_tokens=3, top_k=10**12) == engine.generate_batch([1], max_tokens=3)


def test_parameters_can_be_swapped_between_requests(tiny, engine):
    config, params = tiny
    first = engine.generate_batch([511, 1], max_tokens=10, temperature=0.0)
    before = compiled_programs()
    engine.params = {**params, "lm_head": jax.tree.map(lambda x: -x, params["lm_head"])}
    second = engine.generate_batch([511, 1], max_tokens=10, temperature=0.0)
    request = engine.submit([511, 1], 10)
    with pytest.raises(RuntimeError, match="while requests run"):
        engine.params = params
    engine.cancel(request)
    engine.step()
    engine.params = params
    assert engine.generate_batch([511, 1], max_tokens=10, temperature=0.0) == first != second
    assert compiled_programs() == before


@pytest.mark.parametrize("model", ["scripted", pytest.param("real", marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_warm_up(tiny, model):
    """Which programs there are depends on lengths and rows only, so a model that compiles quickly shows it too."""
    config, params = tiny
    other: dict[str, Any] = {}
    if model == "scripted":
        params, other = ScriptedModel.params(CASES["scripted"][0]), {"model": ScriptedModel}
    capacity = 100 if other else 300
    warm = Engine(config, params, golden_tokenizer(), slots=3, capacity=capacity, steps_per_call=4, **other)
    assert warm.warm_up() > 0
    before = compiled_programs()
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(100):
        length = int(rng.integers(1, capacity))
        settings: dict[str, Any] = dict(
            temperature=float(rng.choice([0.0, 0.7])), top_k=int(rng.integers(0, 600)), seed=int(rng.integers(1 << 30))
        )
        requests.append(warm.submit(rng.integers(0, 520, length).tolist(), min(5, capacity + 1 - length), **settings))
    drain(warm, requests)
    warm.generate_batch([511, 4], num_samples=5, max_tokens=20)
    assert compiled_programs() == before


def test_the_storage_is_donated_and_never_copied(tiny):
    engine = Engine(tiny[0], tiny[1], None, slots=4, capacity=256, steps_per_call=8)
    old = engine._programs.storage
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(old)]
    engine.generate_batch([1, 2, 3], num_samples=2, max_tokens=9)
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(engine._programs.storage)] == pointers


@pytest.mark.slow  # that they can be swapped without compiling is tested above
def test_parameters_are_arguments_of_the_programs(tiny):
    """A closed-over parameter would be a constant in the program: with other parameters, the same program serves."""
    engine = Engine(tiny[0], tiny[1], None, slots=1, capacity=64, steps_per_call=2)
    before = compiled_programs()
    drain(engine, [engine.submit([1, 2], 3)])
    engine.params = jax.tree.map(lambda x: x * 2, tiny[1])
    drain(engine, [engine.submit([1, 2], 3)])
    assert compiled_programs() == before + 3  # the two halves of a prefill, and decode


def test_log_probabilities_are_those_of_the_full_forward(tiny):
    engine = Engine(tiny[0], tiny[1], golden_tokenizer(), slots=4, capacity=256, steps_per_call=8, logprobs=True)
    prompt = CASES["greedy"][0]["prompt_tokens"]
    # different temperatures and lengths: the log-probabilities are the model's, not those of the sampling distribution
    requests = [
        engine.submit(prompt, 9 + 3 * i, 0.5 + i, top_k=20 * i, seed=i, stream=i, run_on=True) for i in range(3)
    ]
    drain(engine, requests)
    for r in requests:
        ids = np.zeros((1, 128), np.int32)
        ids[0, : len(prompt) + len(r.tokens)] = prompt + r.tokens
        logp = np.asarray(jax.nn.log_softmax(full_forward(*tiny, ids)))[0]
        expected = [logp[len(prompt) - 1 + i, token] for i, token in enumerate(r.tokens)]
        np.testing.assert_allclose(r.logprobs, expected, atol=2e-4)
