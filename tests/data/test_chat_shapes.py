"""What people's own conversations look like: read with their meaning, refused with a reason, or named as not used."""

import json
import math
from collections import Counter
from typing import Any

import pytest

from nanochat_jax.data.chat_files import load_chat_file
from nanochat_jax.data.chat_shapes import to_conversation
from nanochat_jax.utils.errors import InputError
from tests.tokenizer_fixtures import golden_tokenizer


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def talk(*texts):
    return [(user, assistant)[i % 2](text) for i, text in enumerate(texts)]


HI = talk("Hi", "Hello.")
NAN = math.nan

# --- null, and what data frames write for it, is absent ---------------------------------------------------------------

ABSENT: list[tuple[Any, list[dict[str, Any]]]] = [
    ({"messages": None, "conversations": [{"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Bye."}]},
     talk("Bye", "Bye.")),
    ({"messages": [], "conversation": [{"from": "user", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, HI),
    ({"messages": HI, "conversations": None, "prompt": None, "completion": None, "system": None, "tools": None}, HI),
    ([{"role": "user", "from": None, "content": "Hi", "value": None, "tool_calls": None, "weight": None},
      {"role": None, "from": "gpt", "content": None, "value": "Hello.", "name": None, "function_call": None}], HI),
    ([*HI, None], HI),
    ([{"role": "system", "content": None}, *HI], HI),
    ([{"role": "system", "content": " "}, *HI], HI),
    ({"system": " ", "messages": HI}, HI),
    ({"prompt": None, "instruction": "Hi", "input": None, "output": None, "response": "Hello."}, HI),
    ({"prompt": "", "question": "Hi", "completion": "", "answer": "Hello."}, HI),
    ({"instruction": "Hi", "input": NAN, "context": NAN, "output": "Hello.", "response": NAN}, HI),
    ({"messages": NAN, "question": "Hi", "answer": "Hello.", "history": []}, HI),
    ([user([{"type": "text", "text": "H"}, {"type": "text", "text": None}, None, {"type": "text", "text": "i"}]),
      HI[1]], HI),
    ([HI[0], assistant([{"type": "text", "text": "Hello."}, {"type": "text", "text": None}])],
     [HI[0], assistant([{"type": "text", "text": "Hello."}])]),
    ([user([{"type": "text", "text": "Hi", "image_url": None}]), HI[1]], HI),
    ({"messages": HI, "tools": [], "functions": "[]", "images": {}, "label": None, "weight": None}, HI),
]  # fmt: skip

# --- keys that say what belongs to the question -----------------------------------------------------------------------

CAT, PETS = "Which colour is the cat?", "Mia has a black cat and a white dog."
BOTH = talk(f"{CAT}\n\n{PETS}", "Black.")
QUESTIONS: list[tuple[Any, list[dict[str, Any]]]] = [
    *(({first: CAT, second: PETS, "response": "Black."}, BOTH)
      for first in ("prompt", "instruction", "question", "query")
      for second in ("input", "context", "passage", "document", "article", "paragraph", "background", "knowledge",
                     "inputs", "contexts", "story")),
    ({"input": CAT, "context": PETS, "output": "Black."}, BOTH),
    ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, talk("a\n\nb\n\nc", "d")),
    ({"instruction": "a", "question": "b", "answer": "c"}, talk("a\n\nb", "c")),
    ({"instruction": "a cat", "input": "a", "output": "c"}, talk("a cat\n\na", "c")),
    ({"prompt": f"Use this.\n{CAT}\n{PETS}\n", "question": CAT, "context": PETS, "answer": "Black."},
     talk(f"Use this.\n{CAT}\n{PETS}\n", "Black.")),
    ({"history": [["a", "b"], ["c", "d"]], "instruction": "e", "output": "f"}, talk(*"abcdef")),
    ({"history": talk("a", "b"), "query": "c", "response": "d"}, talk(*"abcd")),
    ({"prompt": talk("a", "b", "c"), "completion": "d"}, talk(*"abcd")),
    ({"prompt": "a", "completion": [assistant("b")]}, talk("a", "b")),
    ({"system": "S", "messages": [{"role": "system", "content": "S"}, *HI]}, [{"role": "system", "content": "S"}, *HI]),
    ([user([{"type": "input_text", "text": "Hi"}]), assistant([{"type": "output_text", "text": "Hello."}])],
     [HI[0], assistant([{"type": "text", "text": "Hello."}])]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "messages"), [*ABSENT, *QUESTIONS])
def test_values_are_read_with_their_meaning(tmp_path, value, messages):
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps(value) + "\n" + json.dumps(HI) + "\n")  # NaN is written as NaN
    file = load_chat_file(path)
    assert [file[i]["messages"] for i in range(len(file))] == [messages, HI], file.problems


# --- keys that say what is trained on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [
    {"weight": 0}, {"weight": 0.0}, {"weight": False}, {"train": False}, {"loss": False}, {"training": False},
    {"trainable": False}, {"loss": 0}, {"loss_scale": 0.0}, {"masked": True}, {"weight": 1, "train": False},
])  # fmt: skip
def test_a_message_that_is_not_to_be_learnt_is_only_read(mark):
    value = [user("2+3?"), assistant("It is 5.", **mark), user("And 1+1?"), assistant("2.", weight=1)]
    conversation = to_conversation(value)
    assert conversation["messages"] == [*talk("2+3?"), assistant("It is 5.", weight=0), *talk("And 1+1?", "2.")]
    tokenizer = golden_tokenizer()
    ids, mask = tokenizer.render_conversation(conversation)
    plain, _ = tokenizer.render_conversation({"messages": talk("2+3?", "It is 5.", "And 1+1?", "2.")})
    learnt = [token for token, learn in zip(ids, mask, strict=True) if learn]
    assert ids == plain and learnt == [*tokenizer.encode("2."), tokenizer.encode_special("<|assistant_end|>")]
    with pytest.raises(InputError, match="nothing to learn"):
        to_conversation(value[:2])


@pytest.mark.parametrize("mark", [
    {"weight": 1}, {"weight": 1.0}, {"train": True}, {"loss": True}, {"masked": False}, {"weight": None},
])  # fmt: skip
def test_a_message_that_is_to_be_learnt_is_as_any_other(mark):
    assert to_conversation([user("Hi", weight=0), assistant("Hello.", **mark)]) == {"messages": HI}
    assert to_conversation({"prompt": "Hi", "completion": "Hello.", **mark}) == {"messages": HI}


# --- what is refused --------------------------------------------------------------------------------------------------

CALL = [{"function": {"name": "weather", "arguments": "{}"}}]
REFUSED: list[tuple[str, Any]] = [
    ("weight", [HI[0], assistant("Hello.", weight=0.5)]),
    ("weight", [HI[0], assistant("Hello.", weight="0")]),
    ("weight", [user("Hi", weight=1), HI[1]]),
    ("weight", {"weight": 0.3, "messages": HI}),
    ("nothing to learn", {"weight": 0, "messages": HI}),
    ("nothing to learn", {"train": False, "prompt": "Hi", "completion": "Hello."}),
    ("tool_calls", [HI[0], assistant("Let me see.", tool_calls=CALL)]),
    ("function_call", [HI[0], assistant("Let me see.", function_call=CALL[0])]),
    ("role 'tool'", [*HI, {"role": "tool", "name": "weather", "content": "Sunny"}, assistant("Sunny.")]),
    ("role 'observation'", [HI[0], {"from": "observation", "value": "x"}, HI[1]]),
    ("recipient", [HI[0], assistant("1+1", recipient="python")]),
    ("channel", [HI[0], assistant("Hm.", channel="analysis")]),
    ("tools", {"tools": CALL, "messages": HI}),
    ("tools", {"tools": json.dumps(CALL), "messages": HI}),
    ("'search'", [HI[0], assistant([{"type": "search", "text": "x"}])]),
    ("'search'", [HI[0], assistant([{"type": "python", "name": "search", "text": "x"}])]),
    ("'tool_use'", [HI[0], assistant([{"type": "tool_use", "name": "search", "input": {}}])]),
    ("image", [user([{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "x"}}]), HI[1]]),
    ("images", {"images": ["a.png"], "messages": HI}),
    ("reasoning_content", [HI[0], assistant("Hello.", reasoning_content="The user greets.")]),
    ("refusal", [HI[0], assistant(None, refusal="I cannot.")]),
    ("train_detail", [HI[0], assistant("Hello.", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}])]),
    ("rejected", {"prompt": "Hi", "response": "Hello.", "rejected": "Go."}),
    ("label", {"prompt": "Hi", "completion": "Go.", "label": False}),
    ("mask", {"mask": "Assistant", "messages": HI}),
    ("choices", {"question": "Which?", "choices": ["a", "b"], "answer": "a"}),
    ("history", {"history": ["a", "b"], "query": "c", "response": "d"}),
    ("context", {"question": "Hi", "context": ["a", "b"], "answer": "b"}),
    ("input", {"instruction": "Double it.", "input": 5, "output": "10"}),
    ("input", {"instruction": "Double it.", "input": 0, "output": "0"}),
    ("system", {"system": 5, "messages": HI}),
    ("system", {"system": "A", "messages": [{"role": "system", "content": "B"}, *HI]}),
    ("no answer", {"prompt": "Hi", "completion": None}),
    *((kind, [user(content), HI[1]]) for kind, content in
      (("number", 5), ("boolean", True), ("object", {"text": "Hi"}), ("number", [{"type": "text", "text": 5}]),
       ("list", [{"type": "text", "text": ["Hi"]}]), ("boolean", [{"type": "text", "text": False}]),
       ("object", [{"type": "text", "text": {"a": 1}}]))),
    *(("is a", [HI[0], assistant(content)]) for content in (5, 0, True, {"a": 1}, [{"type": "text", "text": 5}])),
    ("string", [HI[0], assistant([{"type": "python", "text": None}])]),
    ("empty", [HI[0], assistant([{"type": "text", "text": None}])]),
    ("empty", [HI[0], assistant(None)]),
]  # fmt: skip


@pytest.mark.parametrize(("word", "value"), REFUSED)
def test_what_cannot_be_trained_on_is_refused_by_line(tmp_path, word, value):
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps(HI) + "\n" + json.dumps(value) + "\n")
    file = load_chat_file(path)
    assert len(file) == 1 and [(line, word in reason) for line, reason in file.problems] == [(2, True)], file.problems


def test_keys_that_are_not_read_are_named():
    ignored: Counter[str] = Counter()
    for value in (
        {"id": 7, "source": "x", "messages": [user("Hi", name="Mia"), assistant("Hello.", markdown={"a": 1})]},
        {"id": 8, "prompt": "Hi", "completion": "Hello.", "loss": 1.83, "text": "Hi Hello."},
        {"id": None, "note": "", "messages": [user([{"type": "text", "text": "Hi", "cache": True}]), HI[1]]},
    ):
        assert to_conversation(value, ignored) == {"messages": HI}
    assert ignored == {
        "id": 2, "source": 1, "messages: name": 1, "messages: markdown": 1, "loss": 1, "text": 1, "parts: cache": 1
    }  # fmt: skip
