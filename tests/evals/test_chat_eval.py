"""Chat evaluations: the reference's letters and completions, full slots, endings, judges, and what is refused."""

import dataclasses
import itertools
import re
import threading
import time
from typing import Any

import numpy as np
import pytest

from nanochat_jax.evals import chat_eval
from nanochat_jax.evals.scorer import Scorer
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import SamplingParams
from tasks.sandbox import SandboxUnavailable
from tests.fakes import FakeModel, chain_params
from tests.golden_models import golden_model
from tests.tokenizer_fixtures import golden, golden_tokenizer

CASES = golden("chateval_v1")
LETTERS = ["A", "B", "C", "D"]
CAPACITY = max(64, *(len(ids) + case["max_new_tokens"] for case in CASES["generative"] for ids in case["prompt_ids"]))


@pytest.fixture(scope="module")
def engine():
    return Engine(*golden_model(), golden_tokenizer(), slots=4, capacity=CAPACITY, steps_per_call=4)


def generated(engine, task, **settings):
    return chat_eval.evaluate_generative(engine, golden_tokenizer(), task, **settings)


def chosen(scorer, task, **settings):
    return chat_eval.evaluate_categorical(scorer, golden_tokenizer(), task, **settings)


class ListTask:
    """Conversations from a list; `judge` decides (and is always False without one)."""

    name, baseline = "listed", 0.25

    def __init__(self, conversations, judge=lambda conversation, completion: False):
        self.conversations, self.evaluate = conversations, judge

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index):
        return self.conversations[index]


def asked(*questions, answer="no", **more):
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": answer}], **more}
        for q in questions
    ]


def from_prompt(ids, answer, **more):
    """The conversation of a rendered prompt (bos, user_start, ..., user_end, assistant_start)."""
    text = golden_tokenizer().decode(ids[2:-2])
    (conversation,) = asked(text, answer=answer, **more)
    assert golden_tokenizer().render_for_completion(conversation) == ids
    return conversation


def equals_answer(conversation, completion):
    assert completion in conversation["letters"]
    return completion == conversation["messages"][-1]["content"]


class FakeScorer:
    """Prefers the letter that a prompt's length says; remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def choices(self, prompts, letters):
        self.calls.append([len(p) for p in prompts])
        return [np.array([float(i == len(p) % len(row)) for i in range(len(row))]) for p, row in zip(prompts, letters)]  # noqa: B905


# --- the reference's numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["categorical"], ids=lambda c: f"{c['task']}-{c['max_problems']}")
def test_golden_letters(case):
    conversations = [
        from_prompt(ids, answer, letters=re.findall(r"^- .*=(.+)$", golden_tokenizer().decode(ids), re.MULTILINE))
        for ids, answer in zip(case["prompt_ids"], case["correct"], strict=True)
    ]
    task = ListTask(conversations, equals_answer)
    result = chosen(Scorer(*golden_model()), task, max_problems=case["max_problems"])
    assert [item["predicted"] for item in result["items"]] == case["predicted"]
    assert result["accuracy"] == case["accuracy"] and result["n"] == len(case["predicted"])


@pytest.mark.parametrize("case", CASES["generative"], ids=lambda c: str(c["start"]))
def test_golden_completions(engine, case):
    task = ListTask([from_prompt(ids, "x") for ids in case["prompt_ids"]])
    result = generated(engine, task, max_new_tokens=case["max_new_tokens"])
    assert [item["completion"] for item in result["items"]] == case["completions"]
    assert result["accuracy"] == case["accuracy"]


# --- multiple choice ------------------------------------------------------------------------------------------------


def test_categorical_order_progress_and_settings(monkeypatch):
    monkeypatch.setattr(chat_eval, "CHUNK", 4)
    conversations = asked(*("x" * (7 * i % 11 + 1) for i in range(10)), answer="B", letters=LETTERS)
    scorer, seen = FakeScorer(), []
    task = ListTask(conversations, equals_answer)
    result = chosen(scorer, task, progress=lambda *a: seen.append(a), max_problems=9)
    expected = [LETTERS[len(golden_tokenizer().render_for_completion(c)) % 4] for c in conversations[:9]]
    assert [item["predicted"] for item in result["items"]] == expected
    assert [item["correct"] for item in result["items"]] == [int(p == "B") for p in expected]
    assert [s[:2] for s in seen] == [(4, 9), (8, 9), (9, 9)] and seen[-1][2] == result["accuracy"]
    lengths = sum(scorer.calls, [])
    assert lengths == sorted(lengths, reverse=True)
    assert result["baseline"] == 0.25 and result["settings"] == {"max_problems": 9, "data": None}
    assert len({item["id"] for item in result["items"]}) == 9


def test_ids_depend_on_place_and_content():
    def ids(*conversations):
        result = chosen(FakeScorer(), ListTask(list(conversations), equals_answer))
        return [item["id"] for item in result["items"]]

    a, b = asked("one", "two", answer="A", letters=LETTERS)
    assert ids(a, b) == ids(a, b) and not set(ids(a, b)) & set(ids(b, a))
    assert ids(a) != ids(*asked("one", answer="B", letters=LETTERS))


def test_a_letter_must_be_one_token():
    task = ListTask(asked("q", answer="A", letters=["A", "quite long"]))
    with pytest.raises(ValueError, match="'quite long' is [0-9]+ tokens"):
        chosen(FakeScorer(), task)


def test_problem_counts():
    task = ListTask(asked("a", "b"))
    assert [chat_eval.problem_count(task, most) for most in (None, 1, 9)] == [2, 1, 2]
    with pytest.raises(ValueError, match="max_problems.*0"):
        chat_eval.problem_count(task, 0)
    with pytest.raises(ValueError, match="listed has no problems"):
        chat_eval.problem_count(ListTask([]))


# --- open questions -------------------------------------------------------------------------------------------------


def test_all_at_once_equals_one_by_one(engine):
    conversations = asked(*(f"question {'long ' * (i % 4)}{i}?" for i in range(11)))
    seen, judged = [], []

    def judge(conversation, completion):
        judged.append(completion)
        return "t" in completion

    result = generated(engine, ListTask(conversations, judge), max_new_tokens=9, progress=lambda *a: seen.append(a))
    prompts = map(golden_tokenizer().render_for_completion, conversations)
    texts = [engine.generate([prompt], SamplingParams(9, temperature=0.0))[0].text for prompt in prompts]
    assert [item["completion"] for item in result["items"]] == texts
    assert [item["correct"] for item in result["items"]] == [int("t" in text) for text in texts]
    assert seen[-1] == (11, 11, result["accuracy"]) and [s[0] for s in seen] == sorted(s[0] for s in seen)
    assert sorted(judged[1:]) == sorted(texts)  # the first call asks whether it can judge at all
    assert result["pass_at_k"] == {"1": result["accuracy"]}
    assert engine.live == 0


def chained(*chain, also=()):
    """An engine whose model follows a chain of tokens, then writes full stops for ever."""
    config = dataclasses.replace(golden_model()[0], n_layer=1)
    params = chain_params(dict([*itertools.pairwise(chain), *also]), otherwise=ord("."))
    return Engine(config, params, golden_tokenizer(), slots=4, capacity=64, steps_per_call=4, model=FakeModel)


def test_tool_calls_are_part_of_the_completion_and_the_end_is_not():
    special = golden_tokenizer().encode_special
    names = ["<|assistant_start|>", "<|python_start|>", "<|python_end|>", "<|output_end|>", "<|assistant_end|>"]
    start, python, python_end, output_end, end = map(special, names)
    engine = chained(start, python, *b"7+6", python_end, also=[(output_end, end)])
    seen = []

    def judge(conversation, completion):
        seen.append(completion)
        return completion.endswith("13<|output_end|>")

    result = generated(engine, ListTask(asked("a", "b"), judge), max_new_tokens=30)
    assert seen[-1] == "<|python_start|>7+6<|python_end|><|output_start|>13<|output_end|>"
    assert result["accuracy"] == 1.0 and result["unfinished"] == 0.0


def test_a_model_that_never_ends_is_counted():
    start = golden_tokenizer().encode_special("<|assistant_start|>")
    engine = chained(start, *b"ok")
    judge = lambda conversation, completion: completion.startswith("ok....")  # noqa: E731
    result = generated(engine, ListTask(asked(*"abcdef"), judge), max_new_tokens=12)
    assert result["unfinished"] == 1.0 and result["accuracy"] == 1.0
    assert {item["completion"] for item in result["items"]} == {"ok.........."}
    assert result["new_tokens"] == 72


def test_samples_and_pass_at_k(engine):
    conversations = asked(*"abcdef")
    settings: dict[str, Any] = dict(num_samples=5, max_new_tokens=4, temperature=1.5, top_k=0, seed=3)
    texts: dict[str, list[str]] = {}

    def judge(conversation, completion):
        texts.setdefault(conversation["messages"][0]["content"], []).append(completion)
        return len(completion) % 3 == 0 and completion != ""

    result = generated(engine, ListTask(conversations, judge), **settings)
    counts = []
    for letter, item in zip("abcdef", result["items"], strict=True):
        own = texts[letter][1:] if letter == "a" else texts[letter]
        assert len(own) == 5 and len(set(own)) > 1
        counts.append(sum(len(text) % 3 == 0 and text != "" for text in own))
        assert item["n_correct"] == counts[-1] and item["correct"] == int(counts[-1] > 0)
    assert 0 < sum(counts) < 30
    assert list(result["pass_at_k"]) == ["1", "2", "3", "4", "5"]
    assert result["pass_at_k"]["1"] == pytest.approx(sum(counts) / 30)
    assert result["pass_at_k"]["5"] == pytest.approx(result["accuracy"])
    for k, (low, high) in result["pass_at_k_interval"].items():
        assert low <= result["pass_at_k"][k] <= high
    again = generated(engine, ListTask(conversations, judge), **settings)
    assert again["items"] == result["items"]
    few = generated(engine, ListTask(conversations, judge), max_problems=2, **settings)
    assert few["items"] == result["items"][:2]


def test_long_prompts_lose_their_beginning_and_are_counted(engine):
    tokenizer = golden_tokenizer()
    long = "x " * max(300, CAPACITY)
    prompts = [tokenizer.render_for_completion(c) for c in asked(long, "short")]
    cut = chat_eval._fitting(prompts[0], 64, 512)
    assert len(cut) == 33 and cut[0] == tokenizer.bos_id and cut[1:] == prompts[0][-32:]
    assert chat_eval._fitting(prompts[0], 64, 10) == [prompts[0][0], *prompts[0][-54:]]
    assert chat_eval._fitting(prompts[1], 64, 512) == prompts[1]
    result = generated(engine, ListTask(asked(long, "short")), max_new_tokens=512)
    assert result["cut_prompts"] == 1 and result["n"] == 2


def test_judges_run_beside_the_decoder(engine):
    main, threads = threading.get_ident(), set()

    def judge(conversation, completion):
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return True

    generated(engine, ListTask(asked(*"abcdefgh"), judge), max_new_tokens=3)
    assert threads - {main}


def test_without_isolation_the_result_says_so(engine):
    def judge(conversation, completion):
        raise SandboxUnavailable("no namespaces here")

    result = generated(engine, ListTask(asked("a", "b"), judge))
    assert result["skipped"] == "no namespaces here" and "accuracy" not in result and engine.live == 0


def test_a_failing_judge_ends_the_evaluation_and_frees_the_engine(engine):
    def judge(conversation, completion):
        if completion:
            raise ZeroDivisionError("a bug in a task")

    with pytest.raises(ZeroDivisionError):
        generated(engine, ListTask(asked(*"abcdefgh"), judge), max_new_tokens=5)
    assert engine.live == 0


def test_how_answers_are_judged_is_among_the_settings():
    task = ListTask(asked("a"))
    assert "judge" not in chat_eval.generative_settings(task)
    task.judge = "somehow"  # pyright: ignore[reportAttributeAccessIssue]
    assert chat_eval.generative_settings(task)["judge"] == "somehow"


def test_settings_that_cannot_work(engine):
    task = ListTask(asked("a"))
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(num_samples=0), "num_samples.*0"),
        (dict(max_new_tokens=0), "max_new_tokens.*0"),
        (dict(num_samples=4), "temperature 0 are all the same"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            generated(engine, task, **settings)


def test_eval_engine_sizes(monkeypatch):
    config, tokenizer = golden_model()[0], golden_tokenizer()

    def made(new_tokens=20, **sizes):
        engine = chat_eval.eval_engine(*golden_model(), tokenizer, 40, new_tokens, **sizes)
        return engine.slots, engine.capacity

    assert made() == (chat_eval.MAX_SLOTS_CPU, 60)
    assert made(rows=3) == (3, 60) and made(slots=2) == (2, 60)
    assert made(10**6)[1] == 10 * config.sequence_len
    slot = 2 * config.n_layer * config.n_kv_head * config.head_dim * 4 * 128  # 60 and space for a call, rounded up
    monkeypatch.setattr(chat_eval, "CACHE_BYTES_CPU", 5 * slot)
    monkeypatch.setattr(chat_eval, "decode_access", lambda config, platform: "kernel")
    assert made() == (5, 60)
    monkeypatch.setattr(
        chat_eval, "decode_access", lambda config, platform: "copied"
    )  # a call copies up to half a slot
    assert made() == (3, 60)
    task = ListTask(asked("a", "a much longer question"))
    short, long = (len(tokenizer.render_for_completion(task[i])) for i in range(2))
    assert short == chat_eval.longest_prompt(tokenizer, task, 1) < chat_eval.longest_prompt(tokenizer, task) == long
