"""The official openai client against the server: what its users do, and how their mistakes are told."""

import concurrent.futures
import json
import re

import numpy as np
import openai
import pytest

from nanochat_jax.inference.model_runner import compiled_programs
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.text.prompts import chat_prompt
from tests.serve_fixtures import BASE, CAPACITY, HI, serving, toy_engine
from tests.tokenizer_fixtures import golden_tokenizer

SPECIAL = golden_tokenizer().encode_special
SAMPLED = {"model": "tiny", "messages": HI, "max_tokens": 24, "temperature": 1.0}


@pytest.fixture(scope="module")
def tiny():
    """A server of a small random model, warmed up."""
    engine = toy_engine()
    engine.warm_up()
    with serving(engine) as running:
        yield running


@pytest.fixture(scope="module")
def scripted():
    with serving(toy_engine()) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(request):
    yield
    for name in ("tiny", "scripted"):
        if name in request.fixturenames:
            request.getfixturevalue(name).idle()


def ask(running, **changes):
    return running.openai().chat.completions.create(**{**SAMPLED, **changes})


def text_of(stream) -> str:
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


def call(expression: str) -> list[int]:
    tokenizer = golden_tokenizer()
    return [SPECIAL("<|python_start|>"), *tokenizer.encode_text(expression), SPECIAL("<|python_end|>")]


# --- answers --------------------------------------------------------------------------------------


def test_models(tiny):
    (model,) = tiny.openai().models.list().data
    assert model.id == "tiny" and model.object == "model" and model.created == 1_700_000_000
    assert (
        model.model_extra["step"] == 7 and model.model_extra["context_length"] == CAPACITY and model.model_extra["chat"]
    )
    assert tiny.openai().models.retrieve("tiny") == model


def test_completion_and_usage(tiny):
    answer = ask(tiny, seed=1)
    prompt = chat_prompt(HI, golden_tokenizer())
    (expected,) = toy_engine().generate([prompt], SamplingParams(24, top_k=50, seed=1))
    assert answer.choices[0].message.content == expected.text
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length" and answer.system_fingerprint == "tiny-step-7"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(prompt), 24, len(prompt) + 24)


def test_stream_equals_completion(tiny):
    chunks = list(ask(tiny, seed=2, stream=True))
    assert text_of(chunks) == ask(tiny, seed=2).choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and len({c.id for c in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert all(c.usage is None for c in chunks) and len(chunks) > 6
    chunks = list(ask(tiny, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert all(c.usage is None for c in chunks[:-1])


def test_seed(tiny):
    one, same, other = (ask(tiny, seed=s).choices[0].message.content for s in (5, 5, 6))
    assert one == same != other
    assert ask(tiny).choices[0].message.content != ask(tiny).choices[0].message.content, "no seed: a new answer"


def test_n(tiny):
    three = ask(tiny, n=3, seed=5)
    assert [c.index for c in three.choices] == [0, 1, 2]
    texts = [c.message.content for c in three.choices]
    assert len(set(texts)) == 3 and texts[0] == ask(tiny, seed=5).choices[0].message.content
    assert three.usage.completion_tokens == 3 * 24 and three.usage.prompt_tokens == ask(tiny).usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in ask(tiny, n=3, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert len({c.message.content for c in ask(tiny, n=9, seed=8).choices}) == 9, "more than there are slots"


def test_top_p_and_top_k(tiny):
    greedy = ask(tiny, temperature=0).choices[0].message.content
    assert ask(tiny, temperature=0, seed=1).choices[0].message.content == greedy
    assert ask(tiny, top_p=0.0, seed=3).choices[0].message.content == greedy
    assert ask(tiny, seed=3, extra_body={"top_k": 1}).choices[0].message.content == greedy
    assert ask(tiny, seed=3, extra_body={"top_k": 0}).choices[0].message.content != greedy


def test_how_long_a_completion_is(tiny):
    answer = ask(tiny, max_completion_tokens=3, max_tokens=None)
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"
    answer = ask(tiny, max_tokens=100_000, temperature=0)
    usage = answer.usage
    assert answer.choices[0].finish_reason == "stop" or usage.total_tokens == CAPACITY + 1


def test_cached_tokens(tiny):
    conversation = [{"role": "user", "content": "A long beginning that comes back. " * 3}]
    first = ask(tiny, messages=conversation)
    again = ask(tiny, messages=conversation)
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < again.usage.prompt_tokens == first.usage.prompt_tokens


def test_system_message_and_parts(scripted):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]},
    ]
    joined = [{"role": "user", "content": "Be brief.\n\nWhat now?"}]
    scripted.tell([65, SPECIAL("<|assistant_end|>")], joined)
    answer = ask(scripted, messages=messages)
    assert answer.choices[0].message.content == "A" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(chat_prompt(joined, golden_tokenizer()))


@pytest.mark.parametrize("stop", ["STOP", ["zzz", "STOP"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(scripted, stop, stream):
    scripted.tell(list(b"one STO two STOP three four five six seven eight nine ten"))
    answer = ask(scripted, stop=stop, max_tokens=200, stream=stream)
    if stream:
        chunks = list(answer)
        assert text_of(chunks) == "one STO two " and chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert answer.choices[0].message.content == "one STO two " and answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens <= 16 + 4, "the slot was not freed"


def test_tool_calls_in_the_text(scripted):
    scripted.tell([*list(b"So "), *call("12+30"), *[0] * 4, *list(b"!"), SPECIAL("<|assistant_end|>")])
    answer = ask(scripted, max_tokens=100)
    # the calculator's answer takes the place of what the model would have said there
    assert answer.choices[0].message.content == "So <12+30=42>!"
    assert answer.choices[0].message.model_extra["parts"] == [
        {"type": "text", "text": "So "},
        {"type": "python", "text": "12+30"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "!"},
    ]
    chunks = list(ask(scripted, max_tokens=100, stream=True))
    assert text_of(chunks) == "So <12+30=42>!"
    tools = [(c.choices[0].delta.model_extra or {}).get("tool") for c in chunks]
    assert [t for t in tools if t] == [{"call": "12+30"}, {"result": "42"}]
    scripted.tell([*call("12+"), *list(b" well"), SPECIAL("<|assistant_end|>")])
    assert text_of(ask(scripted, max_tokens=100, stream=True)) == "<12+> well", "the calculator refused"


def test_a_completion_is_sent_back(scripted):
    parts = [
        {"type": "python", "text": "12+30"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "!"},
    ]
    counts = set()
    for content in ("<12+30=42>!", parts):
        history = [*HI, {"role": "assistant", "content": content}, {"role": "user", "content": "And?"}]
        counts.add(ask(scripted, messages=history, max_tokens=1).usage.prompt_tokens)
    wrong = [*HI, {"role": "assistant", "content": "<12+30=43>!"}, {"role": "user", "content": "And?"}]
    assert len(counts) == 1 and ask(scripted, messages=wrong, max_tokens=1).usage.prompt_tokens not in counts


def test_utf8_one_byte_at_a_time(scripted):
    text = "naïve 🚀 日本語 👩‍👩‍👧 ok"
    scripted.tell([*text.encode(), SPECIAL("<|assistant_end|>")])
    chunks = list(ask(scripted, max_tokens=200, stream=True))
    assert text_of(chunks) == text and not any("\ufffd" in (c.choices[0].delta.content or "") for c in chunks)
    assert ask(scripted, max_tokens=200).choices[0].message.content == text
    body = json.dumps({"messages": [{"role": "user", "content": "half a character \ud83d"}]})
    answer = scripted.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"


def test_completions(tiny):
    client = tiny.openai()
    settings = dict(model="tiny", max_tokens=12, temperature=0.9, seed=4)
    tokenizer = golden_tokenizer()
    one = client.completions.create(prompt="The sea", **settings)
    ids = [tokenizer.bos_id, *tokenizer.encode_text("The sea")]
    assert client.completions.create(prompt=ids, **settings).choices[0].text == one.choices[0].text
    streamed = client.completions.create(prompt="The sea", stream=True, **settings)
    assert "".join(c.choices[0].text for c in streamed) == one.choices[0].text
    assert one.object == "text_completion" and one.usage.prompt_tokens == len(ids)
    assert client.completions.create(model="tiny", prompt="The sea").usage.completion_tokens <= 16, "OpenAI's default"


def test_several_prompts(tiny):
    client = tiny.openai()
    settings = dict(model="tiny", max_tokens=12, seed=4)
    both = client.completions.create(prompt=["The sea", "A stone"], n=2, **settings)
    alone = [client.completions.create(prompt=p, n=2, **settings) for p in ("The sea", "A stone")]
    assert [c.text for c in both.choices] == [c.text for a in alone for c in a.choices]
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert both.usage.total_tokens == sum(a.usage.total_tokens for a in alone)


def test_many_at_once(tiny):
    before = compiled_programs()
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        alone = [ask(tiny, seed=s).choices[0].message.content for s in range(12)]
        crowd = list(pool.map(lambda s: text_of(ask(tiny, seed=s, stream=True)), range(12)))
    assert crowd == alone and compiled_programs() == before, "something was compiled while serving"


# --- long conversations ---------------------------------------------------------------------------

LONG = [{"role": r, "content": "word " * 12} for _ in range(8) for r in ("user", "assistant")] + HI


def test_a_long_conversation_is_refused_in_tokens(tiny):
    n = len(chat_prompt(LONG, golden_tokenizer()))
    assert n > CAPACITY
    with pytest.raises(openai.BadRequestError) as caught:
        ask(tiny, messages=LONG)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    assert str(n) in caught.value.message and f"{CAPACITY} tokens" in caught.value.message


def test_or_shortened_if_asked(tiny):
    answer = ask(tiny, messages=LONG, extra_body={"truncate_history": True})
    assert answer.usage.prompt_tokens + 24 <= CAPACITY + 1 and answer.usage.completion_tokens > 0
    with pytest.raises(openai.BadRequestError) as caught:
        ask(tiny, messages=[{"role": "user", "content": "word " * 300}], extra_body={"truncate_history": True})
    assert caught.value.code == "context_length_exceeded"


def test_a_long_prompt(tiny):
    for prompt in ("word " * 300, [5] * (CAPACITY + 1), "x" * 200_000):
        with pytest.raises(openai.BadRequestError) as caught:
            tiny.openai().completions.create(model="tiny", prompt=prompt)
        assert caught.value.code == "context_length_exceeded" and f"{CAPACITY} tokens" in caught.value.message
    full = tiny.openai().completions.create(model="tiny", prompt=[5] * CAPACITY, max_tokens=5)
    assert full.usage.completion_tokens == 1


# --- mistakes -------------------------------------------------------------------------------------


def test_unknown_model(tiny):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(tiny, model="gpt-4o")
    assert caught.value.code == "model_not_found" and "'tiny'" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        tiny.openai().models.retrieve("gpt-4o")


def test_log_probabilities_of_a_chat(tiny):
    tokenizer = golden_tokenizer()
    settings: dict = dict(seed=4, logprobs=True, top_logprobs=3, max_tokens=20)
    choice = ask(tiny, **settings).choices[0]
    content = choice.logprobs.content
    assert len(content) == 20 and b"".join(bytes(t.bytes) for t in content).decode("utf-8", "replace").startswith(
        choice.message.content.rstrip("\ufffd")
    )
    prompt = chat_prompt(HI, tokenizer)
    params = SamplingParams(20, top_k=50, seed=4, logprobs=3)
    (expected,) = toy_engine().generate([prompt], params)
    assert [t.logprob for t in content] == pytest.approx(expected.logprobs)
    for entry, top in zip(content, expected.alternatives, strict=True):
        assert [bytes(t.bytes) for t in entry.top_logprobs] == [tokenizer.decode_bytes([i]) for i, _ in top]
        assert len({t.token for t in entry.top_logprobs}) == 3, "every token has a name of its own"
    chunks = list(ask(tiny, stream=True, **settings))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == content and text_of(chunks) == choice.message.content
    alone = ask(tiny, seed=4, logprobs=True, max_tokens=20).choices[0]
    assert [t.logprob for t in alone.logprobs.content] == [t.logprob for t in content]
    assert all(t.top_logprobs == [] for t in alone.logprobs.content)
    assert ask(tiny, seed=4).choices[0].logprobs is None
    for wrong in (dict(top_logprobs=3), dict(logprobs=True, top_logprobs=21), dict(logprobs=1)):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(tiny, **wrong)
        assert caught.value.param in wrong


@pytest.mark.parametrize("prompt", ["The sea is 🌊 wide, ", [1, 300, 5, 515, 77]], ids=["text", "ids"])
@pytest.mark.parametrize("n", [70, 1])
def test_log_probabilities_of_a_prompt(tiny, prompt, n):
    """As lm-eval's local-completions reads them."""
    tokenizer, client = golden_tokenizer(), tiny.openai()
    settings: dict = dict(model="tiny", max_tokens=1, temperature=0, logprobs=1, echo=True)
    prompt = prompt * (n // 4) + prompt[:n] if n > 1 and isinstance(prompt, list) else prompt
    choice = client.completions.create(prompt=prompt, **settings).choices[0]
    ids = prompt if isinstance(prompt, list) else [tokenizer.bos_id, *tokenizer.encode_text(prompt)]
    table = toy_engine().params["table"]
    rows = np.asarray(table)[np.array(ids) % len(table)].astype(np.float64)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    expected = [rows[i, token] for i, token in enumerate(ids[1:])]
    known = choice.logprobs
    first = [None] if isinstance(prompt, list) else []
    found = known.token_logprobs
    assert found[: len(first)] == first and found[len(first) : -1] == pytest.approx(expected, abs=1e-4)
    assert (
        len(found)
        == len(known.tokens)
        == len(known.top_logprobs)
        == len(known.text_offset)
        == len(ids) - 1 + len(first) + 1
    )
    for row, token, top, own in zip(rows, ids[1:], known.top_logprobs[len(first) :], found[len(first) :], strict=False):
        assert (own == max(top.values())) == (token == row.argmax()) and len(top) == 1 + (token != row.argmax())
    shown = prompt if isinstance(prompt, str) else tokenizer.decode([i for i in ids if i < len(tokenizer.ranks)])
    assert choice.text.startswith(shown) and known.text_offset[-1] == len(shown)
    silent = client.completions.create(prompt=prompt, **{**settings, "max_tokens": 0})
    assert silent.choices[0].text == shown and silent.usage.completion_tokens == 0
    assert silent.choices[0].logprobs.token_logprobs == found[:-1] and silent.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(prompt=prompt, stream=True, **settings))
    assert "".join(c.choices[0].text for c in chunks) == choice.text
    assert [p for c in chunks if c.choices[0].logprobs for p in c.choices[0].logprobs.token_logprobs] == found
    plain = client.completions.create(prompt=prompt, **{**settings, "logprobs": None})
    assert plain.choices[0].text == choice.text and plain.choices[0].logprobs is None
    several = client.completions.create(prompt=[prompt, "x"] if isinstance(prompt, str) else [prompt, [7]], **settings)
    assert several.choices[0].logprobs == known and len(several.choices[1].logprobs.tokens) == 2


DIGITS = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
WRITTEN = r'\{ ?"n" ?: ?-?\d+ ?\}'


def schema_format(schema) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


FOLLOWED: list[tuple[dict, str]] = [
    (dict(response_format=schema_format(DIGITS)), WRITTEN),
    (dict(extra_body={"guided_json": json.dumps(DIGITS)}), WRITTEN),
    (dict(extra_body={"guided_regex": "[ab]{4}c"}), "[ab]{4}c"),
    (dict(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}), "yes|no"),
    (dict(extra_body={"guided_grammar": 'start: "x" "y"+'}), "xy+"),
]  # fmt: skip


def test_completions_follow_a_grammar(tiny):
    before = compiled_programs()
    wanted = [(seed, *case) for seed in (1, 2) for case in FOLLOWED]

    def complete(case):
        seed, options, pattern = case
        answer = ask(tiny, seed=seed, max_tokens=60, **options)
        choice, text = answer.choices[0], answer.choices[0].message.content
        if choice.finish_reason == "stop":
            assert re.fullmatch(pattern, text), text
            assert text_of(ask(tiny, seed=seed, max_tokens=60, stream=True, **options)) == text
        return text, choice.finish_reason

    alone = [complete(case) for case in wanted]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        others = [pool.submit(ask, tiny, seed=s, logprobs=True) for s in range(6)]
        assert list(pool.map(complete, wanted)) == alone
        assert [o.result().choices[0].message.content for o in others] == [
            ask(tiny, seed=s).choices[0].message.content for s in range(6)
        ]
    assert sum(reason == "stop" for _, reason in alone) >= 8 and compiled_programs() == before
    answer = ask(tiny, response_format={"type": "json_object"}, max_tokens=20).choices[0].message.content
    assert answer.startswith("{")


@pytest.mark.parametrize(
    "options,field",
    [
        (dict(response_format={"type": "json_schema"}), "response_format"),
        (dict(response_format=schema_format({"type": "wat"})), "response_format"),
        (dict(response_format={"type": "xml"}), "response_format"),
        (dict(extra_body={"guided_regex": "(a"}), "guided_regex"),
        (dict(extra_body={"guided_json": "{"}), "guided_json"),
        (dict(extra_body={"guided_choice": []}), "guided_choice"),
        (dict(extra_body={"guided_grammar": "start: x"}), "guided_grammar"),
        (dict(extra_body={"guided_regex": "a", "guided_choice": ["b"]}), "guided_choice"),
    ],
)  # fmt: skip
def test_what_is_no_grammar_is_named(tiny, options, field):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(tiny, **options)
    assert caught.value.param == field


def test_penalties_and_biases(tiny):
    said = ask(tiny, temperature=0).choices[0].message.content
    options: list[dict] = [
        dict(logit_bias={"66": 100}), dict(frequency_penalty=2), dict(presence_penalty=2.0),
        dict(extra_body={"repetition_penalty": 5}), dict(extra_body={"repetition_penalty": 1e-300}),
        dict(logit_bias={"66": 1e300, "67": -1e300}),
    ]  # fmt: skip
    answers = [ask(tiny, temperature=0, **option).choices[0].message.content for option in options]
    assert answers[0] == "B" * 24 == answers[5] and all(answer != said for answer in answers)
    assert ask(tiny, seed=3, extra_body={"min_p": 1.0}).choices[0].message.content == said
    for field, value in [("logit_bias", {"70000": 1}), ("logit_bias", {"a": 1}), ("frequency_penalty", 2.5)]:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(tiny, **{field: value})
        assert caught.value.param == field
    with pytest.raises(openai.BadRequestError) as caught:
        tiny.openai().completions.create(model="tiny", prompt="a", best_of=3)
    assert caught.value.param == "best_of" and caught.value.code == "unsupported_parameter"
    assert len(tiny.openai().completions.create(model="tiny", prompt="a", n=2, best_of=2).choices) == 2


def test_unsupported_options_are_named_and_their_neutral_values_accepted(tiny):
    with pytest.raises(openai.BadRequestError) as caught:
        tiny.openai().completions.create(model="tiny", prompt="a", suffix="b")
    assert caught.value.param == "suffix" and caught.value.code == "unsupported_parameter"
    neutral = dict(
        tools=[], tool_choice="none", response_format={"type": "text"}, logprobs=False, top_logprobs=0, logit_bias={},
        frequency_penalty=0, presence_penalty=0.0, modalities=["text"], store=False, user="me", n=1, stop=[],
        service_tier="auto", metadata={"a": "b"}, parallel_tool_calls=True,
    )  # fmt: skip
    assert ask(tiny, **neutral).usage.completion_tokens > 0
    done = tiny.openai().completions.create(
        model="tiny", prompt="a", echo=False, best_of=1, suffix="", logprobs=None, max_tokens=2
    )
    assert done.usage.completion_tokens > 0


@pytest.mark.parametrize(
    "changes,field",
    [
        (dict(temperature=2.5), "temperature"),
        (dict(temperature="hot"), "temperature"),
        (dict(top_p=1.5), "top_p"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_tokens=True), "max_tokens"),
        (dict(n=0), "n"),
        (dict(n=1000), "n"),
        (dict(stop=["a"] * 5), "stop"),
        (dict(stop=""), "stop"),
        (dict(seed=1.5), "seed"),
        (dict(messages=[]), "messages"),
        (dict(messages="hello"), "messages"),
        (dict(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]), "messages.0"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "messages"),
        (dict(messages=[*HI, {"role": "user", "content": None}]), "messages.1"),
        (dict(messages=[{"role": "user", "content": [{"type": "python", "text": "1"}]}]), "messages.0"),
        (dict(extra_body={"continue_final_message": True}), "continue_final_message"),
        (dict(extra_body={"continue_final_message": True, "add_generation_prompt": True}), "continue_final_message"),
    ],
)
def test_wrong_values_are_named(tiny, changes, field):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(tiny, **changes)
    assert caught.value.param == field and caught.value.type == "invalid_request_error"


def prompt_tokens(running, messages, **more) -> int:
    return ask(running, messages=messages, max_tokens=1, extra_body=more).usage.prompt_tokens


def test_messages_of_other_servers_clients(tiny):
    u, a = HI[0], {"role": "assistant", "content": "Well, ", "id": "7", "reasoning_content": None, "refusal": "x"}
    plain = prompt_tokens(tiny, HI)
    assert prompt_tokens(tiny, [{**u, "id": 1, "metadata": {}, "name": "Ann", "cache_control": {}}]) == plain
    for roles in (
        "system system user",
        "user system",
        "assistant user",
        "user user",
        "system",
        "developer user system",
    ):
        assert prompt_tokens(tiny, [{"role": role, "content": "x"} for role in roles.split()]) > 3
    # a last message of the assistant is continued
    begun = len(golden_tokenizer().encode_text("Well, "))
    assert prompt_tokens(tiny, [u, a]) == plain + begun
    assert prompt_tokens(tiny, [u, a], continue_final_message=True, add_generation_prompt=False) == plain + begun
    assert prompt_tokens(tiny, [u, {**a, "content": None}]) == plain
    assert prompt_tokens(tiny, [u, a], continue_final_message=False) == plain + begun + 2
    assert prompt_tokens(tiny, [u, a], add_generation_prompt=True) == plain + begun + 2
    assert prompt_tokens(tiny, HI, add_generation_prompt=False) == plain - 1
    assert prompt_tokens(tiny, [u, a], truncate_history=True) == plain + begun


def test_a_continued_message_is_continued(scripted):
    messages = [*HI, {"role": "assistant", "content": "The sea "}]
    scripted.tell([*b"is blue", SPECIAL("<|assistant_end|>")], messages)
    assert ask(scripted, messages=messages).choices[0].message.content == "is blue"
    assert text_of(ask(scripted, messages=messages, stream=True)) == "is blue"


ODD_FIELDS = {
    "ignored_by_all": 1, "thinking": {"type": "enabled"}, "reasoning_effort": "low", "store": True,
    "modalities": ["audio"], "service_tier": "flex", "chat_template": None, "stream_options": {"chunk_size": 3},
    "bad\r\nname: x": 1, "ö": 2,
}  # fmt: skip


def test_unknown_fields_are_ignored_and_named(tiny, caplog):
    caplog.set_level("INFO")
    for stream in (False, True):
        answer = tiny.post("/v1/chat/completions", messages=HI, max_tokens=1, stream=stream, **ODD_FIELDS)
        named = answer.headers["x-ignored-fields"].split(", ")
        assert answer.status_code == 200 and {*named} == {
            "ignored_by_all", "thinking", "reasoning_effort", "store", "modalities", "service_tier", "chat_template",
            "stream_options.chunk_size", "?",
        }  # fmt: skip
    assert caplog.text.count("ignored_by_all") == 1
    for quiet in (HI, [{**HI[0], "id": 3}]):
        answer = tiny.post("/v1/chat/completions", messages=quiet, max_tokens=1, store=False, user="me", audio=None)
        assert "x-ignored-fields" not in answer.headers
    assert "top_words" in tiny.post("/v1/completions", max_tokens=1, top_words=3).headers["x-ignored-fields"]


STRICTLY = [
    ({"temprature": 1}, "temprature"), ({"store": True}, "store"), ({"stream_options": {"x": 1}}, "stream_options"),
    ({"messages": [{**HI[0], "id": 1}]}, "messages"), ({"modalities": ["audio"]}, "modalities"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "", "id": 3}]}]}, "messages"),
]  # fmt: skip


def test_a_strict_server_refuses_them():
    with serving(toy_engine(), strict=True) as running:
        for changes, field in STRICTLY:
            answer = running.post("/v1/chat/completions", **{"messages": HI, "max_tokens": 1, **changes})
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "unknown_parameter"
            assert answer.json()["error"]["param"] == field
        fine = {"store": False, "service_tier": "auto", "modalities": ["text"], "audio": None, "user": "me"}
        answer = running.post("/v1/chat/completions", messages=[{**HI[0], "name": "Ann"}], max_tokens=1, **fine)
        assert answer.status_code == 200


def test_a_base_model_completes_only():
    with serving(toy_engine(), BASE) as running:
        assert running.openai().completions.create(model="tiny", prompt="The", max_tokens=3).choices[0].text
        with pytest.raises(openai.BadRequestError) as caught:
            ask(running)
        assert caught.value.code == "model_not_chat" and "/v1/completions" in caught.value.message


def test_the_queue_is_full():
    with serving(toy_engine(pause=0.02), queue=0) as running:
        busy = [ask(running, stream=True, max_tokens=110) for _ in range(4)]
        with pytest.raises(openai.RateLimitError) as caught:
            ask(running)
        assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60
        assert caught.value.code == "queue_full"
        for stream in busy:
            stream.close()
        running.idle()
        assert ask(running).usage.completion_tokens == 24
