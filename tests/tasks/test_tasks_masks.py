"""Which tokens one conversation of every task trains: runs of (mask, text), bos first, written out by hand."""

import itertools
import json

import pytest

import tasks
from tests.tokenizer_fixtures import golden_tokenizer

MC = (
    "Multiple Choice question: Red or blue?\n- red=A\n- blue=B\n- green=C\n- grey=D\n"
    "\nRespond only with the letter of the correct answer."
)
ROWS = {
    "ARC-Easy/train": {
        "question": "Red or blue?",
        "choices": {"text": ["red", "blue", "green", "grey"], "label": list("ABCD")},
        "answerKey": "B",
    },
    "mmlu/test": {"question": "Red or blue?", "choices": ["red", "blue", "green", "grey"], "answer": 1, "subject": "s"},
    "gsm8k/train": {"question": "Two and three?", "answer": "It is <<2+3=5>>5.\n#### 5"},
    "humaneval/test": {
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "entry_point": "one",
        "test": "def check(f): assert f() == 1",
    },
    "smoltalk/train": {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Farewell"},
        ]
    },
}
ASKED = "<|bos|><|user_start|>{}<|user_end|><|assistant_start|>"
CHOSEN = [(0, ASKED.format(MC)), (1, "B<|assistant_end|>")]

EXPECTED = {
    "ARC-Easy": CHOSEN,
    "MMLU": CHOSEN,
    "GSM8K": [
        (0, ASKED.format("Two and three?")),
        (1, "It is <|python_start|>2+3<|python_end|>"),
        (0, "<|output_start|>5<|output_end|>"),
        (1, "5.\n#### 5<|assistant_end|>"),
    ],
    "HumanEval": [(0, ASKED.format("def one():\n")), (1, "def one():\n\n    return 1\n<|assistant_end|>")],
    "SmolTalk": [
        (0, ASKED.format("Be kind.\n\nHi")),
        (1, "Hello<|assistant_end|>"),
        (0, "<|user_start|>Bye<|user_end|><|assistant_start|>"),
        (1, "Farewell<|assistant_end|>"),
    ],
    "CustomJSON": [(0, ASKED.format("who are you")), (1, "a boat<|assistant_end|>")],
    "SimpleSpelling": [(0, ASKED.format("Spell the word: noon")), (1, "noon:n,o,o,n<|assistant_end|>")],
    "SpellingBee": [
        (0, ASKED.format("Find the count of \"o\" in 'noon'?")),
        (
            1,
            "We are asked to find the number 'o' in the word 'noon'. Let me try a manual approach first.\n\n"
            "First spell the word out:\nnoon:n,o,o,n\n\nThen count the occurrences of 'o':\n"
            "1:n\n2:o hit! count=1\n3:o hit! count=2\n4:n\n\nThis gives us 2."
            "\n\nLet me double check this using Python:\n\n<|python_start|>'noon'.count('o')<|python_end|>",
        ),
        (0, "<|output_start|>2<|output_end|>"),
        (1, "\n\nPython gives us 2.\n\nMy final answer is:\n\n#### 2<|assistant_end|>"),
    ],
}


def conversation(name, folder):
    if name == "CustomJSON":
        path = folder / "own.jsonl"
        path.write_text('[{"role": "user", "content": "who are you"}, {"role": "assistant", "content": "a boat"}]\n')
        return tasks.CustomJSON(path)[0]
    if "Spelling" in name:
        return tasks.load(name, "train", words=["noon"])[2]
    for place, row in ROWS.items():
        path = folder / f"{place}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
    return tasks.load(name, "train" if name in ("ARC-Easy", "GSM8K", "SmolTalk") else "test", folder)[0]


@pytest.mark.parametrize("name", EXPECTED)
def test_trained_tokens(name, tmp_path):
    tokenizer = golden_tokenizer()
    ids, mask = tokenizer.render_conversation(conversation(name, tmp_path))
    runs = []
    for learn, group in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        runs.append((learn, tokenizer.decode([token for token, _ in group])))
    assert runs == EXPECTED[name]
