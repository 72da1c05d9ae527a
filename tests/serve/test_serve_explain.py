"""What is wrong with a body, in a user's words. No server: the schemas and the sentences."""

import pytest
from pydantic import ValidationError

from nanochat_jax.serve import schemas
from nanochat_jax.serve.explain import explain

HI = [{"role": "user", "content": "Hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}

CHAT = [
    ({}, "messages: it is missing"),
    ({"messages": None}, "messages: must be a list, not null"),
    ({"messages": "Hello"}, 'messages: must be a list, not "Hello"'),
    ({"messages": []}, "messages: must not be empty"),
    ({"messages": ["Hello"]}, 'messages.0: must be an object, not "Hello"'),
    ({"messages": [{"content": "x"}]}, "messages.0.role: it is missing"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "messages.0.role: must be "),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: must be text or a list, not 3"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages.0.content: must be text or a list, not an obj"),
    ({"messages": [*HI, {"role": "user", "content": [IMAGE]}]}, "messages.1.content.0.type: this model reads text"),
    ({"messages": [{"role": "user", "content": [3]}]}, "messages.0.content.0: must be text or an object, not 3"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: it is missing"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        "messages.0.content.0.text: must be text, not null",
    ),
    (
        {"messages": [{"role": "user", "content": ["a", {"type": "text", "text": ["b"]}]}]},
        "messages.0.content.1.text: must be text, not a list",
    ),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages.0.content: holds half a surrogate pair"),
    ({"messages": HI, "stop": list("abcde")}, "stop: must have at most 4 entries; there are 5"),
    ({"messages": HI, "stop": ""}, "stop: must not be empty"),
    ({"messages": HI, "stop": ["a", ""]}, "stop.1: must not be empty"),
    ({"messages": HI, "stop": ["a", 3]}, "stop.1: must be text, not 3"),
    ({"messages": HI, "stop": 3}, "stop: must be text or a list, not 3"),
    ({"messages": HI, "max_tokens": "many"}, 'max_tokens: must be a whole number, not "many"'),
    ({"messages": HI, "max_tokens": True}, "max_tokens: must be a whole number, not true"),
    ({"messages": HI, "max_tokens": 1.5}, "max_tokens: must be a whole number, not 1.5"),
    ({"messages": HI, "max_tokens": 0}, "max_tokens: must be at least 1, not 0"),
    ({"messages": HI, "temperature": [1]}, "temperature: must be a number, not a list"),
    ({"messages": HI, "temperature": 2.5}, "temperature: must be at most 2"),
    ({"messages": HI, "temperature": float("inf")}, "temperature: must be a finite number"),
    ({"messages": HI, "temperature": float("nan")}, "temperature: must be a finite number"),
    ({"messages": HI, "seed": 10**400}, "seed: must be less than 9223372036854775808, not such a long number"),
    ({"messages": HI, "stream": "yes"}, 'stream: must be true or false, not "yes"'),
    ({"messages": HI, "stream_options": 1}, "stream_options: must be an object, not 1"),
    ({"messages": HI, "stream_options": {"include_usage": 1}}, "stream_options.include_usage: must be true or false"),
    ({"messages": HI, "model": "m" * 999}, "model: must have at most 512 characters"),
]  # fmt: skip
TEXT = [
    ({"prompt": 3}, "prompt: must be text or a list, not 3"),
    ({"prompt": []}, "prompt: must not be empty"),
    ({"prompt": ["a", 3]}, "prompt."),
    ({"prompt": [1, -5]}, "prompt.1: must be at least 0, not -5"),
    ({"prompt": {"text": "a"}}, "prompt: must be text or a list, not an object"),
]
OTHER = [
    (None, "the body must be a JSON object; it is empty"),
    ([1], "the body must be a JSON object; it is a list"),
    ("x", 'the body must be a JSON object; it is "x"'),
    (3, "the body must be a JSON object; it is 3"),
]
CASES = [(schemas.ChatRequest, *case) for case in [*CHAT, *OTHER]] + [(schemas.CompletionRequest, *c) for c in TEXT]


@pytest.mark.parametrize("schema,body,said", CASES)
def test_the_field_is_named_and_the_problem_told_in_words(schema, body, said):
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(body)
    error = explain([{**e, "loc": ("body", *e["loc"])} for e in caught.value.errors()], body)
    assert error.status == 400 and error.message.startswith(said)
    assert "pydantic" not in error.message and "type=" not in error.message and "constrained" not in error.message


def test_no_json():
    found = {
        "type": "json_invalid",
        "loc": ("body", 5),
        "msg": "JSON decode error",
        "ctx": {"error": "Expecting value"},
    }
    assert explain([found], "{nope").message == "the body is no JSON: Expecting value at character 5"
