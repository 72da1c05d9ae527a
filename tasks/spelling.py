"""SpellingBee and SimpleSpelling: made-up tasks that teach a model the letters inside its tokens.

Every example is a pure function of the word list, the split and its number: CPython's ``random.Random`` seeded with it,
drawn from in the reference's order, so that equal lists give the reference's conversations.
"""

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat_jax.data.fetch import FetchError, fetch_url
from nanochat_jax.data.readers import DataError
from nanochat_jax.demo_world.tables import read_table
from nanochat_jax.utils.paths import base_dir, sha256_hex
from tasks.gsm8k import NUMBERS, evaluate_answer
from tasks.task import SEED, STRICT, Conversation, Task, TaskError

logger = logging.getLogger(__name__)

WORDS_FILE = "words_alpha.txt"
WORDS_URL = f"https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/{WORDS_FILE}"
TEST_SEED_OFFSET = 10_000_000
SPLITS = ("train", "test")

_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_QUOTES = ["", "'", '"']
TEMPLATES = read_table("spelling", "tasks")["templates"]


class _WordTask(Task):
    """``size`` examples made from a word list: ``words``, or ``words_alpha.txt`` of ``task_data``, or the fetched one.

    Test example i is seeded with 10,000,000 + i, so none is a training example. ``v1_compat`` seeds it as the reference
    of October 2025 did, with -(i + 1): CPython drops the sign, so that every test example was a training example.
    """

    def __init__(
        self,
        size: int = 1000,
        split: str = "train",
        task_data: str | Path | None = None,
        words: Sequence[str] | None = None,
        v1_compat: bool = False,
        **slicing,
    ):
        super().__init__(**slicing)
        if split not in SPLITS:
            raise TaskError(f"{self.name} has no split {split!r}; it has {', '.join(SPLITS)}")
        if not 1 <= size <= TEST_SEED_OFFSET:
            raise TaskError(f"{self.name}: size is {size}; it must be from 1 to {TEST_SEED_OFFSET}")
        self.size, self.split, self.v1_compat = size, split, v1_compat
        self.words = load_words(task_data) if words is None else _checked(words)
        self._words_sha256 = sha256_hex("\n".join(self.words).encode())

    def num_examples(self) -> int:
        return self.size

    def _random(self, index: int) -> random.Random:
        if self.split == "train":
            return random.Random(index)
        return random.Random(-(index + 1) if self.v1_compat else TEST_SEED_OFFSET + index)

    def identity(self) -> dict[str, Any]:
        seeding = "v1" if self.v1_compat and self.split == "test" else "apart"
        return {"split": self.split, "words": self._words_sha256, "seeding": seeding}


class SpellingBee(_WordTask):
    """How many times is a letter in a word: spelled out, counted, checked with Python, answered after ``####``.

    ``strict`` compares final numbers as strings, as the reference does; else they are compared as numbers.
    """

    name = "SpellingBee"
    eval_type = "generative"

    def __init__(self, *args, strict: bool = False, **options):
        super().__init__(*args, **options)
        self.strict, self.judge = strict, STRICT if strict else NUMBERS

    def get_example(self, index: int) -> Conversation:
        rng = self._random(index)
        word = rng.choice(self.words)
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(_ALPHABET)
        template = rng.choice(TEMPLATES)
        if rng.random() < 0.3:
            template = template.lower()
        letter_quote, word_quote = rng.choice(_QUOTES), rng.choice(_QUOTES)
        question = template.format(
            letter=f"{letter_quote}{letter}{letter_quote}", word=f"{word_quote}{word}{word_quote}"
        )
        if rng.random() < 0.5:
            question += "?"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": _counting(word, letter)},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return evaluate_answer(conversation, completion, self.strict)


def _counting(word: str, letter: str) -> list[dict[str, str]]:
    """The worked answer. No spaces around single letters, so that each is the token of the bare letter."""
    text = (
        f"We are asked to find the number '{letter}' in the word '{word}'. Let me try a manual approach first.\n\n"
        f"First spell the word out:\n{spelled(word)}\n\nThen count the occurrences of '{letter}':\n"
    )
    found = 0
    for place, char in enumerate(word, 1):
        found += char == letter
        text += f"{place}:{char}" + (f" hit! count={found}\n" if char == letter else "\n")
    text += f"\nThis gives us {found}."
    return [
        {"type": "text", "text": text},
        {"type": "text", "text": "\n\nLet me double check this using Python:\n\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(found)},
        {"type": "text", "text": f"\n\nPython gives us {found}.\n\nMy final answer is:\n\n#### {found}"},
    ]


class SimpleSpelling(_WordTask):
    """Spell a word: ``Spell the word: cat`` is answered ``cat:c,a,t``. For training only."""

    name = "SimpleSpelling"

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # Else example i would have the word of SpellingBee's example i.
        self.words = list(self.words)
        random.Random(SEED).shuffle(self.words)

    def get_example(self, index: int) -> Conversation:
        word = self._random(index).choice(self.words)
        messages = [
            {"role": "user", "content": f"Spell the word: {word}"},
            {"role": "assistant", "content": spelled(word)},
        ]
        return {"messages": messages}


def spelled(word: str) -> str:
    """``cat`` as ``cat:c,a,t``."""
    return f"{word}:{','.join(word)}"


# --- words ----------------------------------------------------------------------------------------------------------


def load_words(task_data: str | Path | None = None) -> list[str]:
    """The words, one a line, of ``task_data``'s words_alpha.txt or (None) of the base directory's, downloaded once.

    Lines that are not letters A to Z alone are left out and counted in a warning: a word with a quote in it would break
    the Python expression, and the calculator takes no other letters. Raises FileNotFoundError or FetchError saying how
    to get the list, DataError if it has no word.
    """
    if task_data is not None:
        path = Path(task_data) / WORDS_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {path}: put a list of words there, one a line (the reference's is {WORDS_URL}), or leave "
                "--task_data out to download it"
            )
    else:
        path = base_dir() / WORDS_FILE
        try:
            fetch_url(WORDS_URL, path)
        except FetchError as error:
            raise type(error)(f"{error}; or put a list of words, one a line, into {path}") from error
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    stripped = [word for line in lines if (word := line.strip())]
    words = [word for word in stripped if _usable(word)]
    if len(words) < len(stripped):
        logger.warning("%s: left out %d lines that are not letters alone", path, len(stripped) - len(words))
    if not words:
        raise DataError(f"{path} has no word; it needs one of the letters A to Z on each line")
    return words


def _usable(word: str) -> bool:
    return word.isascii() and word.isalpha()


def _checked(words: Sequence[str]) -> list[str]:
    bad = next((word for word in words if not _usable(word)), None)
    if bad is not None:
        raise TaskError(f"the word {bad!r} is not made of the letters A to Z alone")
    if not words:
        raise TaskError("the list of words is empty")
    return list(words)
