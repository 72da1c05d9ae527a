"""The calculator as a tool that the client offers and computes."""

import json

import openai
import pytest

from nanochat_jax.text.prompts import chat_prompt
from tests.serve_fixtures import HI, serving, toy_engine
from tests.tokenizer_fixtures import golden_tokenizer

SPECIAL = golden_tokenizer().encode_special


@pytest.fixture(scope="module")
def scripted():
    with serving(toy_engine()) as running:
        yield running


def ask(running, **changes):
    settings = {"model": "tiny", "messages": HI, "max_tokens": 24, "temperature": 1.0, **changes}
    return running.openai().chat.completions.create(**settings)


def text_of(stream) -> str:
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


def call(expression: str) -> list[int]:
    tokenizer = golden_tokenizer()
    return [SPECIAL("<|python_start|>"), *tokenizer.encode_text(expression), SPECIAL("<|python_end|>")]


def function(name: str, **properties) -> dict:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOL, OTHER = function("calculator", sum={"type": "string"}), function("weather")
WEATHER = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


def test_the_calculator_as_a_tool_of_the_client(scripted):
    scripted.tell([*list(b"So "), *call("12+30"), *list(b"no!")])
    first = ask(scripted, max_tokens=100, tools=[TOOL]).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.content == "So "
    (made,) = first.message.tool_calls
    assert made.function.name == "calculator" and json.loads(made.function.arguments) == {"sum": "12+30"}
    chunks = list(ask(scripted, max_tokens=100, tools=[TOOL], stream=True, n=2))
    deltas = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert [d.function.arguments for d in deltas] == [made.function.arguments] * 2 and len({d.id for d in deltas}) == 2
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["tool_calls"] * 2
    assert text_of(chunks) == "So So " and "<12+30=42>" in ask(scripted, max_tokens=100).choices[0].message.content
    # the result comes back: the same message goes on
    result = {"role": "tool", "tool_call_id": made.id, "content": "42"}
    history = [*HI, first.message.model_dump(exclude_none=True), result]
    texts = {"text": "So ", "python": "12+30", "python_output": "42"}
    parts = [{"type": kind, "text": text} for kind, text in texts.items()]
    same = [*HI, {"role": "assistant", "content": parts}]
    n = len(chat_prompt(same, golden_tokenizer(), resume=True))
    scripted.tell([*list(b"!"), SPECIAL("<|assistant_end|>")], n=n)
    answer = ask(scripted, messages=history, tools=[TOOL])
    assert answer.choices[0].message.content == "!" and answer.usage.prompt_tokens == n
    later = [*history, {"role": "assistant", "content": "!"}, *HI]
    whole = {"role": "assistant", "content": [*parts, {"type": "text", "text": "!"}]}
    ended = chat_prompt([*HI, whole, *HI], golden_tokenizer())
    assert ask(scripted, messages=later, max_tokens=1).usage.prompt_tokens == len(ended)
    # a call that must be made begins at once
    scripted.tell([0, *list(b"7*8"), SPECIAL("<|python_end|>")])
    for choice in ("required", {"type": "function", "function": {"name": "calculator"}}):
        forced = ask(scripted, max_tokens=100, tools=[TOOL], tool_choice=choice).choices[0]
        assert (
            json.loads(forced.message.tool_calls[0].function.arguments) == {"sum": "7*8"} and not forced.message.content
        )


@pytest.mark.parametrize(
    "options,field",
    [
        (dict(tools=[OTHER]), "tools"),
        (dict(tools=[TOOL, OTHER]), "tools"),
        (dict(tool_choice="required"), "tool_choice"),
        (dict(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "x"}}), "tool_choice"),
        (dict(tools=[{"type": "function"}]), "tools"),
        (dict(messages=[*HI, {"role": "tool", "tool_call_id": "1", "content": "x"}]), "messages.1"),
        (dict(messages=[*HI, {"role": "assistant", "tool_calls": [WEATHER]}]), "messages.1"),
    ],
)  # fmt: skip
def test_other_tools_are_refused(scripted, options, field):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(scripted, **options)
    assert caught.value.param == field
    assert ask(scripted, tools=[OTHER], tool_choice="none", max_tokens=1).usage.completion_tokens == 1
