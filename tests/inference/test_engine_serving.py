"""What the engine does for many requests at once: shared prefixes, tools beside the loop, chunks in turn, devices."""

import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

from nanochat_jax.inference import model_runner, programs
from nanochat_jax.inference.engine import PREFILL_CHUNK, Engine
from nanochat_jax.inference.model_runner import ModelRunner
from nanochat_jax.inference.request import Request, SamplingParams
from nanochat_jax.inference.scheduler import Scheduler
from nanochat_jax.model import gpt
from tests.fakes import FakeModel, fake_params
from tests.tokenizer_fixtures import golden_tokenizer

SPECIAL = golden_tokenizer().encode_special


def model(n_layer):
    vocab_size = golden_tokenizer().vocab_size
    config = gpt.GPTConfig(sequence_len=256, vocab_size=vocab_size, n_layer=n_layer, n_head=4, n_kv_head=2, n_embd=32)
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda a: rng.standard_normal(a.shape, np.float32) * 0.2, gpt.abstract(config))


@pytest.fixture(scope="module")
def tiny():
    return model(n_layer=1)


def make(tiny, **settings) -> Engine:
    return Engine(tiny[0], tiny[1], None, **{"slots": 4, "steps_per_call": 4, **settings})


def drain(engine, *requests):
    while any(r.finished is None for r in requests):
        engine.step()
    return [r.tokens for r in requests]


def alone(tiny, request, **settings):
    """What a request is told by an engine of its own."""
    fresh = make(tiny, **settings)
    check = fresh.submit(request.prompt, request.params)
    drain(fresh, check)
    assert check.reused == 0
    return check.tokens


def prompt_of(seed, n):
    return np.random.default_rng(seed).integers(0, 256, n).tolist()


# --- shared prefixes ------------------------------------------------------------------------------


def test_a_conversation_resumes_where_its_slot_stopped(tiny):
    engine, turns, seen = make(tiny), prompt_of(1, 35), []
    for turn in range(3):
        request = engine.submit(turns, SamplingParams(8, temperature=0.7, seed=turn))
        other = engine.submit(prompt_of(90 + turn, 40), SamplingParams(5))  # somebody else meanwhile
        drain(engine, request, other)
        assert request.tokens == alone(tiny, request)
        seen.append(request.reused)
        turns = turns + request.tokens + prompt_of(50 + turn, 5)
    # all of prompt and answer but the answer's last token, which was never fed
    assert seen == [0, 35 + 7, 35 + 8 + 5 + 7]


def test_samples_of_one_prompt_prefill_it_once(tiny, monkeypatch):
    engine, lengths = make(tiny), []
    original = model_runner.prefill
    monkeypatch.setattr(model_runner, "prefill", lambda *a, **k: lengths.append(a[4].shape[1]) or original(*a, **k))
    params = [SamplingParams(9, seed=5, sample_index=i) for i in range(6)]
    rows = engine.generate([prompt_of(2, 60)] * 6, params)
    assert lengths == [64]
    assert len({tuple(r.tokens) for r in rows}) == 6


def test_a_common_prefix_is_copied_and_the_conversation_it_came_from_kept():
    tiny = model(n_layer=2)  # every layer's keys and values have to be copied
    engine = make(tiny)
    system = prompt_of(3, 20)
    first = engine.submit(system + prompt_of(4, 34), SamplingParams(8, temperature=0.0))
    drain(engine, first)
    second = engine.submit(system + prompt_of(5, 16), SamplingParams(8, temperature=0.0))
    drain(engine, second)
    again = engine.submit(first.prompt + first.tokens + [7], SamplingParams(8, temperature=0.0))
    drain(engine, again)
    assert second.reused == 20 and second.slot != first.slot
    assert again.slot == first.slot and again.reused == len(first.prompt) + 7
    for request in (second, again):
        assert alone(tiny, request) == request.tokens


def test_a_request_whose_prefix_donor_is_cancelled_prefills_for_itself(tiny):
    engine, prompt = make(tiny, slots=3, capacity=1500), prompt_of(6, 1300)
    running = engine.submit([1, 2], SamplingParams(60, temperature=0.0))  # keeps prefilling down to a chunk a step
    engine.step()
    donor = engine.submit(prompt, SamplingParams(4, temperature=0.0))
    request = engine.submit(prompt + [3], SamplingParams(4, temperature=0.0))
    engine.step()
    assert 0 < donor.prefilled < 1299 and request.prefilled == 0 and request.reused == 1299
    engine.cancel(donor)
    drain(engine, request, running)
    assert alone(tiny, request, slots=3, capacity=1500) == request.tokens


def test_new_parameters_forget_what_the_old_ones_computed(tiny):
    engine = make(tiny)
    other = jax.tree.map(lambda x: x * 1.5, tiny[1])
    prompt = prompt_of(7, 60)
    running = [engine.submit(prompt, SamplingParams(40, temperature=0.0)) for _ in range(4)]
    engine.step()
    waiting = engine.submit(prompt, SamplingParams(12, temperature=0.0))
    engine.replace_params(other)
    drain(engine, *running, waiting)
    assert all(len(r.tokens) == 40 for r in running) and waiting.reused == 0
    for params, request in ((tiny[1], running[0]), (other, waiting)):
        assert alone((tiny[0], params), request) == request.tokens


def assign(scheduler, prompt):
    request = Request(list(prompt), SamplingParams(), 5, number=0)
    found = scheduler.assign(request)
    if found is not None:
        request.slot, request.prefilled = found.slot, len(prompt) - 1
    return request, found


def test_slots_are_taken_where_least_is_lost():
    scheduler = Scheduler(4)
    a, b, c = range(100), range(200, 300), range(300, 400)
    requests = [assign(scheduler, p)[0] for p in (a, b, c)]
    assert [r.slot for r in requests] == [0, 1, 2]
    for request in requests:
        request.finished = "end"
        scheduler.release()
    assert assign(scheduler, range(500, 550))[1].slot == 3  # the empty one first
    request, found = assign(scheduler, [*b, 7])
    assert (found.slot, found.source, found.shared) == (1, 1, 99)  # only what was in the cache: not the last token
    assert assign(scheduler, range(600, 650))[1].slot == 0  # then the one freed longest ago
    assert assign(scheduler, [*c, 1])[1].slot == 2
    assert assign(scheduler, [1])[1] is None


def test_devices_are_filled_evenly_and_copies_stay_on_one():
    scheduler = Scheduler(4, devices=2)
    donor, first = assign(scheduler, range(50))
    donor.prefilled = 10
    assert assign(scheduler, range(500, 600))[1].slot == 2  # the other device
    request, second = assign(scheduler, range(60))
    assert (second.slot, second.source, second.shared, second.prefix_donor) == (1, 0, 49, donor)
    _, third = assign(scheduler, range(60))  # the first device is full: computed anew on the second
    assert (third.slot, third.source, third.shared, third.prefix_donor) == (3, 3, 0, None)


# --- tools ----------------------------------------------------------------------------------------


def calls_a_tool() -> Any:
    """A `FakeModel` that always says: <python_start> 1 <python_end>, then 2 2 2 ..."""
    return fake_params(script=[SPECIAL("<|python_start|>"), 49, SPECIAL("<|python_end|>"), 50], first=19)


def calling_engine(tiny, tool, **settings):
    settings = {"slots": 2, "steps_per_call": 4, "capacity": 128, **settings}
    return Engine(tiny[0], calls_a_tool(), golden_tokenizer(), tool=tool, model=FakeModel, **settings)


def test_a_slow_tool_holds_up_its_own_slot_only(tiny):
    gate = threading.Event()
    engine = calling_engine(tiny, lambda text: gate.wait(20) and "77")
    caller = engine.submit(list(range(20)), SamplingParams(30, temperature=0.0))
    other = engine.submit([3], SamplingParams(18, temperature=0.0))  # ends before the script would make a call
    for _ in range(60):
        engine.step()
        if other.finished:
            break
    assert other.finished == "length" and caller.finished is None
    assert caller.tokens == [SPECIAL("<|python_start|>"), 49, SPECIAL("<|python_end|>")]
    gate.set()
    drain(engine, caller)
    start, end = SPECIAL("<|output_start|>"), SPECIAL("<|output_end|>")
    answer = golden_tokenizer().encode_text("77")
    assert caller.tokens[3 : 5 + len(answer)] == [start, *answer, end]
    assert caller.masks[: 6 + len(answer)] == [1, 1, 1, 0, *[0] * len(answer), 0, 1]
    assert len(caller.tokens) == 30 == len(caller.masks)


def test_an_engine_that_waits_for_tools_makes_the_same_calls_whatever_they_take(tiny, monkeypatch):
    """Which rows are decoded together decides how sums are rounded: what is to repeat may not hang on the clock."""
    calls: list[int] = []
    real = ModelRunner.decode

    def decode(self, batch, *args):
        calls.append(batch.size)
        return real(self, batch, *args)

    monkeypatch.setattr(ModelRunner, "decode", decode)

    def history(slow: int):
        turn = iter(range(8))

        def tool(text):
            time.sleep(0.05 * (next(turn) % 2 == slow))
            return "77"

        engine = calling_engine(tiny, tool, wait_for_tools=True)
        calls.clear()
        tokens = drain(engine, *[engine.submit([i, *range(19)], SamplingParams(20, temperature=0.0)) for i in range(4)])
        return list(calls), tokens

    histories = [history(0), history(1)]
    assert histories[0] == histories[1] and len(histories[0][0]) > 2


def test_a_tool_that_fails_or_has_no_answer_adds_nothing(tiny):
    def fails(text):
        raise ZeroDivisionError(text)

    for tool in (fails, lambda text: None):
        engine = calling_engine(tiny, tool)
        request = engine.submit(list(range(20)), SamplingParams(10, temperature=0.0))
        drain(engine, request)
        assert request.tokens[3:] == [50] * 7 and set(request.masks) == {1}


def test_cancelling_while_a_tool_works_frees_the_slot(tiny):
    gate = threading.Event()
    engine = calling_engine(tiny, lambda text: gate.wait(20))
    request, other = (engine.submit(list(range(20)), SamplingParams(30, temperature=0.0)) for _ in range(2))
    for _ in range(3):
        engine.step()
    assert request.tool is not None and other.tool is not None  # both slots are taken
    engine.cancel(request)
    after = engine.submit([3], SamplingParams(2, temperature=0.0))
    drain(engine, after)
    gate.set()
    drain(engine, other)


# --- many at once ---------------------------------------------------------------------------------


def test_a_long_prompt_does_not_stall_the_others(tiny):
    engine = make(tiny, slots=3, capacity=1500)
    running = engine.submit([1, 2, 3], SamplingParams(60, temperature=0.0))
    engine.step()
    long = [engine.submit(prompt_of(i, 1300), SamplingParams(4, temperature=0.0)) for i in (11, 12)]
    while not all(r.ready for r in long):
        before = running.position, sum(r.prefilled for r in long)
        engine.step()
        assert running.position == before[0] + 4
        assert sum(r.prefilled for r in long) - before[1] <= PREFILL_CHUNK
    drain(engine, running, *long)


@pytest.mark.slow
def test_rows_that_stop_do_not_lose_or_change_tokens(tiny):
    """With 16 rows a call goes on after the first has stopped: what the stopped one computes then is dropped."""
    many = make(tiny, slots=16, steps_per_call=8)
    requests = [many.submit([5, i], SamplingParams(3 + i % 7, temperature=0.9, seed=i)) for i in range(24)]
    drain(many, *requests)
    for request in requests:
        assert alone(tiny, request) == request.tokens
        assert len(request.tokens) == request.params.max_tokens == len(request.masks)


@pytest.mark.parametrize("devices", [1, 2])
def test_short_prompts_are_prefilled_together(tiny, devices, monkeypatch):
    engine = make(tiny, slots=14, devices=jax.devices()[:devices])
    shapes = []
    original = model_runner.prefill
    monkeypatch.setattr(model_runner, "prefill", lambda *a, **k: shapes.append(a[4].shape) or original(*a, **k))
    prompts = [prompt_of(i, 2 + i) for i in range(12)] + [prompt_of(20, 100), prompt_of(21, 30)]
    requests = [engine.submit(p, SamplingParams(6, temperature=0.9, seed=i)) for i, p in enumerate(prompts)]
    together = drain(engine, *requests)
    if devices == 1:
        assert shapes == [(4, 16)] * 3 + [(1, 128), (4, 32)]
    else:  # six short ones on each
        assert shapes[:2] == [(8, 16)] * 2 and len(shapes) <= 4
    assert [alone(tiny, request, slots=1) for request in requests] == together


def test_only_prompts_of_one_program_are_prefilled_together(tiny):
    runner = make(tiny, slots=8, capacity=500)._runner
    turn = [(slot, 0, 16) for slot in range(4)]
    assert [runner.joins(turn[:n], 7, 0, 5) for n in range(5)] == [True] * 4 + [False]
    assert not runner.joins(turn[:1], 7, 0, 17) and runner.joins([(0, 0, 17)], 7, 0, 32)
    assert not runner.joins([(0, 0, 65)], 7, 0, 65), "one call would make the others wait"
    assert not runner.joins(turn[:1], 7, 60, 5), "it would look at old tokens, which the first has not"
    assert runner.joins([(0, 60, 7)], 7, 1, 5) and not runner.joins([(0, 60, 7)], 7, 65, 5)


def test_what_is_to_be_done_meanwhile_is_done_once_while_the_device_works(tiny, monkeypatch):
    engine, log = make(tiny), []
    original = model_runner.decode
    monkeypatch.setattr(model_runner, "decode", lambda *a, **k: log.append("decode") or original(*a, **k))

    def step(**settings):
        log.clear()
        events = engine.step(lambda: log.append("meanwhile"), **settings)
        return log.copy(), [len(event.tokens) for event in events]

    assert step() == (["meanwhile"], [])
    engine.submit([1, 2, 3], SamplingParams(6))
    assert step() == (["decode", "meanwhile"], [4])
    assert step(steps=1) == (["decode", "meanwhile"], [1])
    assert step(steps=99) == (["decode", "meanwhile"], [1])


@pytest.mark.slow  # programs for four numbers of rows
def test_only_as_many_rows_are_decoded_as_there_are_requests(tiny, monkeypatch):
    engine, sizes = make(tiny, slots=8), []
    original = model_runner.decode
    monkeypatch.setattr(model_runner, "decode", lambda *a, **k: sizes.append(a[5].shape[0]) or original(*a, **k))
    first = [engine.submit([9, i], SamplingParams(8, temperature=0.0)) for i in range(7)]
    drain(engine, *first)
    assert set(sizes) == {8}
    sizes.clear()
    # requests in slots 4 and 5 alone, while the others hold what they hold
    goes_on = [engine.submit(prompt_of(i, 40), SamplingParams(30, temperature=0.9, seed=i)) for i in range(7)]
    while len(goes_on[4].tokens) < 8:
        engine.step()
    for i in (0, 1, 2, 3, 6):
        engine.cancel(goes_on[i])
    sizes.clear()
    drain(engine, goes_on[4], goes_on[5])
    assert set(sizes) == {4}
    again = engine.submit(goes_on[2].prompt + goes_on[2].tokens, SamplingParams(9, temperature=0.9, seed=2))
    drain(engine, again)
    assert again.reused > 40 and sizes[-1] == 1  # what an idle neighbour computed did not hurt
    for request in (goes_on[4], goes_on[5], again):
        assert alone(tiny, request) == request.tokens


@pytest.fixture(scope="module")
def spread(tiny):
    return make(tiny, slots=8, capacity=128, devices=jax.devices()[:4])


@pytest.mark.slow  # programs for four devices; two are tested above
def test_slots_over_devices_give_the_same_tokens(tiny, spread):
    one = make(tiny, slots=1, capacity=128)
    settings = [dict(max_tokens=5 + 3 * i, temperature=0.8, top_k=20 * i, seed=i, logprobs=0) for i in range(12)]
    prompts = [prompt_of(i, 34 + 2 * i) if i % 3 else prompt_of(0, 60) + [i] for i in range(12)]
    a = [spread.submit(p, SamplingParams(**s)) for p, s in zip(prompts, settings, strict=True)]
    b = [one.submit(p, SamplingParams(**s)) for p, s in zip(prompts, settings, strict=True)]
    assert drain(spread, *a) == drain(one, *b)
    assert {r.slot // 2 for r in a} == {0, 1, 2, 3}
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=2e-5)
        assert len(x.logprobs) == len(x.tokens)


def test_devices_do_not_talk_to_each_other_and_nothing_is_copied(spread):
    zeros = np.zeros
    row_slots = np.tile(np.arange(spread.slots // 4, dtype=np.int32), 4)
    rows = zeros((spread.slots, programs.N_COLUMNS + 4), np.int32)
    control = zeros((4, programs.N_CONTROL + 2), np.int32)
    ids, where = zeros((4, 16), np.int32), zeros((4, 3), np.int32)  # one row a device
    runner = spread._runner
    common = spread.model, spread.config, runner.params, runner.storage
    compiled: Any = programs
    nothing = runner.nothing_adjusted(spread.slots)
    settings = dict(max_new_steps=4, access=runner._access)
    decode = compiled.decode.lower(
        *common, row_slots, rows, control, *nothing, visible=64, mesh=runner.mesh, **settings
    )
    compute = compiled._compute.lower(*common, ids, where, visible=64, mesh=runner.mesh)
    for text in (decode.compile().as_text(), compute.compile().as_text()):
        for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
            assert collective not in text

    def pointers():
        return [s.data.unsafe_buffer_pointer() for x in jax.tree.leaves(runner.storage) for s in x.addressable_shards]

    before = pointers()
    spread.generate([[1, 2, 3]] * 8, [SamplingParams(9, sample_index=i) for i in range(8)])
    assert pointers() == before


@pytest.mark.slow
def test_nothing_is_compiled_after_warm_up_on_several_devices(tiny):
    engine = make(tiny, capacity=200, devices=jax.devices()[:2])
    counts = []
    assert engine.warm_up(lambda done, total: counts.append((done, total))) > 0
    assert counts[0][0] == 0 and counts[-1][0] == counts[-1][1]
    before, rng = model_runner.compiled_programs(), np.random.default_rng(0)
    base = prompt_of(0, 150)
    requests = []
    for _ in range(60):
        length = int(rng.integers(1, 190))
        prompt = base[: min(length, 150)] + prompt_of(int(rng.integers(99)), max(0, length - 150))
        requests.append(
            engine.submit(prompt, SamplingParams(int(rng.integers(1, 9)), temperature=float(rng.choice([0.0, 1.0]))))
        )
    drain(engine, *requests)
    assert model_runner.compiled_programs() == before
