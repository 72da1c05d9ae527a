"""/v1/responses, /tokenize, /detokenize and /tokenizer_info."""

import openai
import pytest

from nanochat_jax.text.prompts import chat_prompt
from tests.serve_fixtures import BASE, CAPACITY, HI, serving, toy_engine
from tests.tokenizer_fixtures import golden_tokenizer

SPECIAL = golden_tokenizer().special_tokens
PARTS = [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}]


@pytest.fixture(scope="module")
def scripted():
    with serving(toy_engine()) as running:
        yield running


def tell(running, text: str, messages=HI) -> None:
    running.tell([*text.encode(), SPECIAL["<|assistant_end|>"]], messages)


def test_a_response(scripted):
    tell(scripted, "Good day, naïve 🚀!")
    client = scripted.openai()
    answer = client.responses.create(model="tiny", input="Hello", max_output_tokens=60)
    assert answer.output_text == "Good day, naïve 🚀!" and answer.status == "completed" and answer.error is None
    assert answer.usage.input_tokens == len(chat_prompt(HI, golden_tokenizer())) and answer.model == "tiny"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 20
    assert answer.output[0].role == "assistant" and answer.object == "response" and answer.id.startswith("resp_")
    for same in ([{"role": "user", "content": "Hello"}], [{"type": "message", "role": "user", "content": PARTS}]):
        assert client.responses.create(model="tiny", input=same).output_text == answer.output_text
    cut = client.responses.create(model="tiny", input="Hello", max_output_tokens=5)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_a_streamed_response(scripted):
    tell(scripted, "Good day, naïve 🚀!")
    events = list(scripted.openai().responses.create(model="tiny", input="Hello", stream=True, max_output_tokens=60))
    kinds = [event.type for event in events]
    assert kinds[:4] == [f"response.{k}" for k in ("created", "in_progress", "output_item.added", "content_part.added")]
    ends = ("output_text.done", "content_part.done", "output_item.done", "completed")
    assert kinds[-4:] == [f"response.{k}" for k in ends] and set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events[4:-4]) == events[-1].response.output_text == "Good day, naïve 🚀!"
    assert events[-1].response.usage.output_tokens > 20 and events[0].response.id == events[-1].response.id
    with scripted.openai().responses.stream(model="tiny", input="Hello", max_output_tokens=5) as stream:
        assert [event.type for event in stream][-1] == "response.incomplete"


def test_a_conversation_with_instructions(scripted):
    said, asked = [{"type": "output_text", "text": "Hi."}], {"role": "user", "content": "And?"}
    history = [*HI, {"role": "assistant", "content": said}, asked]
    same = [{"role": "system", "content": "Be brief."}, *HI, {"role": "assistant", "content": "Hi."}, asked]
    tell(scripted, "So.", same)
    answer = scripted.openai().responses.create(model="tiny", input=history, instructions="Be brief.", temperature=0)
    assert answer.output_text == "So." and answer.instructions == "Be brief." and answer.temperature == 0


def test_what_a_response_cannot_be_is_named(scripted):
    for wrong, field in [
        (dict(input=[]), "input"),
        (dict(input=[{"role": "user", "content": None}]), "input.0"),
        (dict(previous_response_id="resp_1"), "previous_response_id"),
        (dict(max_output_tokens=0), "max_output_tokens"),
        (dict(input="word " * 300), "input"),
        (dict(text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "wat"}}}), "text"),
        (dict(tools=[{"type": "web_search"}]), "tools"),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            scripted.openai().responses.create(**{"model": "tiny", "input": "Hello", **wrong})
        assert caught.value.param == field, (wrong, caught.value)
    with serving(toy_engine(), BASE) as base, pytest.raises(openai.BadRequestError) as caught:
        base.openai().responses.create(model="tiny", input="Hello")
    assert caught.value.code == "model_not_chat"


def test_tokens_there_and_back(scripted):
    tokenizer = golden_tokenizer()
    text = "The naïve 🚀 sea.<|bos|>"
    found = scripted.post("/tokenize", prompt=text, return_token_strs=True).json()
    ids = [tokenizer.bos_id, *tokenizer.encode_text(text)]
    assert found["tokens"] == ids and found["count"] == len(ids) == len(found["token_strs"])
    assert found["max_model_len"] == CAPACITY
    plain = scripted.post("/tokenize", model="tiny", prompt=text, add_special_tokens=False).json()["tokens"]
    assert plain == ids[1:] and scripted.post("/detokenize", tokens=plain).json() == {"prompt": text}
    chat = scripted.post("/tokenize", messages=HI).json()["tokens"]
    assert chat == chat_prompt(HI, tokenizer)
    assert scripted.post("/tokenize", messages=HI, add_generation_prompt=False).json()["tokens"] == chat[:-1]
    assert scripted.post("/tokenize", messages=HI * 200).json()["count"] > CAPACITY, "however long"
    assert scripted.post("/detokenize", tokens=[]).json() == {"prompt": ""}
    info = scripted.http.get("/tokenizer_info").json()
    for name in (info["bos_token"], info["eos_token"]):  # as lm-eval asks for their ids
        assert scripted.post("/tokenize", prompt=name, add_special_tokens=False).json()["tokens"] == [SPECIAL[name]]
    for path, body, field in [
        ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"), ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/tokenize", {"prompt": 5}, "prompt"), ("/tokenize", {"messages": [{"role": "user"}]}, "messages.0"),
    ]:  # fmt: skip
        answer = scripted.post(path, **body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field
    assert scripted.post("/tokenize", prompt="a", model="other").status_code == 404
    assert scripted.openai().models.list().data[0].model_extra["max_model_len"] == CAPACITY
