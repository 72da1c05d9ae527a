import copy
import json

import pytest

from nanochat_jax.text import chat_format
from tests.tokenizer_fixtures import golden, golden_tokenizer

GOLDEN = golden("render_v1")


@pytest.mark.parametrize("call", ["conversations", "render_for_completion"])
def test_rendering_equals_the_reference(call):
    tokenizer = golden_tokenizer()
    for case in GOLDEN[call]:
        argument = {"messages": copy.deepcopy(case["messages"])}
        if call == "conversations":
            found = tokenizer.render_conversation(argument, max_tokens=case["max_tokens"])
            assert found == (case["ids"], case["mask"]), case["messages"]
        else:
            assert tokenizer.render_for_completion(argument) == case["ids"], case["messages"]
        assert argument == {"messages": case["messages"]}, "the argument was changed"


@pytest.mark.parametrize("case", GOLDEN["errors"], ids=lambda c: c["call"] + json.dumps(c["messages"])[:60])
def test_errors_have_the_reference_s_types(case):
    tokenizer = golden_tokenizer()
    call = tokenizer.render_conversation if case["call"] == "render" else tokenizer.render_for_completion
    with pytest.raises(Exception) as caught:
        call({"messages": case["messages"]})
    assert type(caught.value).__name__ == case["exception"]["type"]


def test_only_what_the_assistant_writes_is_trained_on():
    """An independent reading of the mask: decode the learnt tokens of a conversation with a tool call."""
    tokenizer = golden_tokenizer()
    parts = [{"type": "text", "text": "Let me see: "}, {"type": "python", "text": "6*7"}]
    parts += [{"type": "python_output", "text": "42"}, {"type": "text", "text": "It is 42."}]
    messages = [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "Six times seven?"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Any time"},
    ]
    ids, mask = tokenizer.render_conversation({"messages": messages})
    learnt = tokenizer.decode([token for token, learn in zip(ids, mask, strict=True) if learn])
    expected = "Let me see: <|python_start|>6*7<|python_end|>It is 42.<|assistant_end|>Any time<|assistant_end|>"
    assert learnt == expected
    assert tokenizer.decode(ids).startswith("<|bos|><|user_start|>Be exact.\n\nSix times seven?<|user_end|>")


def test_truncation_is_a_prefix_and_a_completion_may_be_one_longer():
    tokenizer = golden_tokenizer()
    chat = {"messages": [{"role": "user", "content": "word " * 50}, {"role": "assistant", "content": "yes " * 50}]}
    whole, mask = tokenizer.render_conversation(chat, max_tokens=10_000)
    for limit in (0, 1, 17, len(whole), len(whole) + 5):
        assert tokenizer.render_conversation(chat, max_tokens=limit) == (whole[:limit], mask[:limit])
    primed = tokenizer.render_for_completion(chat, max_tokens=20)
    assert len(primed) == 21 and primed[-1] == tokenizer.encode_special("<|assistant_start|>")
    with pytest.raises(ValueError, match="max_tokens"):
        tokenizer.render_conversation(chat, max_tokens=-1)


def test_works_with_any_encoder():
    ids, mask = chat_format.render_conversation(
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]},
        encode=lambda text: list(text.encode()),
        special=lambda name: 1000 + len(name),
    )
    assert ids == [1007, 1014, 97, 98, 1012, 1019, 99, 1017] and mask == [0, 0, 0, 0, 0, 0, 1, 1]


def test_visualisation():
    tokenizer = golden_tokenizer()
    shown = tokenizer.visualize_tokenization([65, 66], [0, 1])
    assert shown == "\033[91mA\033[0m|\033[92mB\033[0m"
    with_ids = tokenizer.visualize_tokenization([65], [1], with_token_id=True)
    assert with_ids == "\033[92mA\033[0m|\033[90m(65)\033[0m"
    with pytest.raises(ValueError, match="2 ids but 1"):
        tokenizer.visualize_tokenization([65, 66], [0])
