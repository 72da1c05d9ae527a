import itertools
import json
import re

import pytest

from nanochat_jax.data.chat_files import load_chat_file
from tasks.identity import PHRASES, TOPICS, identity_conversations, phrasings, write_identity_file
from tests.tokenizer_fixtures import golden_tokenizer


def texts(conversations, role):
    return [m["content"] for c in conversations for m in c["messages"] if m["role"] == role]


def bare(text):
    return re.sub(r"\W+", " ", text.lower()).strip()


def test_the_same_arguments_give_the_same_conversations():
    some = identity_conversations("Pip", "Ada", 50)
    assert some == identity_conversations("Pip", "Ada", 200)[:50]
    assert some != identity_conversations("Pip", "Ada", 50, seed=1)
    assert some != identity_conversations("Pip", "Ada", 50, split="val")
    renamed = json.loads(json.dumps(some).replace("Pip", "Momo"))
    assert renamed == identity_conversations(" Momo\n", "Ada", 50)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("creator", ["", "Ada Lovelace"])
def test_every_conversation_can_be_trained_on(split, creator):
    tokenizer = golden_tokenizer()
    conversations = identity_conversations("Pip", creator, 400, split=split)
    for conversation in conversations:
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and 2 <= len(roles) <= 14
        assert all(m["content"] == m["content"].strip() != "" for m in conversation["messages"])
        assert any(tokenizer.render_conversation(conversation)[1])
    everything = json.dumps(conversations)
    assert not re.search(r"[\[\]|{}]", " ".join(texts(conversations, "user") + texts(conversations, "assistant")))
    assert ".." not in " ".join(texts(conversations, "assistant"))
    assert ("Ada Lovelace" in everything) == bool(creator)


def test_what_is_asked_in_val_is_never_asked_in_training():
    train = {bare(text) for text in texts(identity_conversations("Pip", "", 4000), "user")}
    val = {bare(text) for text in texts(identity_conversations("Pip", "", 4000, split="val"), "user")}
    assert not train & val and len(val) > 500 < len(train)


def test_phrasings_are_on_one_side_only():
    """By construction: all that the templates can become, not only what was drawn."""

    def expanded(phrases):
        parts = [re.split(r"\[([^\]]*)\]", phrase) for phrase in phrases]
        options = [[part.split("|") if i % 2 else [part] for i, part in enumerate(phrase)] for phrase in parts]
        return {bare("".join(choices)) for phrase in options for choices in itertools.product(*phrase)}

    lists = [topic["questions"] for topic in TOPICS]
    sides = {}
    for split in ("train", "val"):
        sides[split] = [expanded(phrasings(phrases, split)) for phrases in lists]
        sides[split] += [expanded(phrasings(p, split)) for p in (PHRASES["greetings"], PHRASES["links"])]
        sides[split] += [expanded(phrasings(PHRASES["closings"], split))]
        sides[split] += [{bare(greeting) for greeting, _ in phrasings(PHRASES["foreign"], split)}]
    assert not set().union(*sides["train"]) & set().union(*sides["val"])
    assert all(len(part) >= 3 for part in sides["val"]) and all(len(part) >= 12 for part in sides["train"])
    questions = [question for part in sides["train"][: len(lists)] for question in part]
    assert len(questions) == len(set(questions)) > 220  # no question belongs to two topics
    assert "who are you" in sides["train"][1] and "what is your name" in sides["train"][0]


def test_variety():
    conversations = identity_conversations("Pip", "Ada", 1000)
    assert len({json.dumps(c) for c in conversations}) > 970
    assert len({c["messages"][0]["content"] for c in conversations}) > 700
    lengths = {len(c["messages"]) for c in conversations}
    assert {2, 4, 6, 8} <= lengths
    asked = texts(conversations, "user")
    assert sum(text.isupper() for text in asked) > 50 and sum(text.islower() for text in asked) > 200
    assert sum(not text.isascii() for text in asked) > 5
    answers = " ".join(texts(conversations, "assistant"))
    for fact in ("Pip", "Ada", "nanochat_jax", "open source", "MIT", "small", "language model", "English", "internet",
                 "mistakes", "forget", "only read and write text", "not a person"):  # fmt: skip
        assert answers.count(fact) >= 3, fact
    mistyped = [t for t in asked if re.search(r"\b(waht|waat|nmae|naame|yuo|youu|aer)\b", t.lower())]
    assert mistyped, "nobody mistypes"


def test_names_of_all_kinds():
    for name, creator in (("Dr. No.", "Acme Inc."), ("Zoë {x} [y|z]", "A & B"), ("R2-D2!", "")):
        answers = " ".join(texts(identity_conversations(name, creator, 300), "assistant"))
        assert name in answers and creator in answers and ".." not in answers and "!." not in answers
    for named, name, more in (("name", " \n", {}), ("'test'", "Pip", {"split": "test"}), ("-1", "Pip", {"n": -1})):
        with pytest.raises(ValueError, match=named):
            identity_conversations(name, **more)


def test_the_file_has_the_reference_shape(tmp_path):
    path = write_identity_file(tmp_path / "identity.jsonl", "Pip", "Ada", n=40, seed=3)
    lines = path.read_text(encoding="utf-8").splitlines()
    expected = identity_conversations("Pip", "Ada", 40, seed=3)
    assert [json.loads(line) for line in lines] == [c["messages"] for c in expected]
    file = load_chat_file(path)
    assert [file[i] for i in range(len(file))] == expected and not file.problems
    assert [p.name for p in tmp_path.iterdir()] == ["identity.jsonl"]
