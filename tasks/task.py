"""What a task is: a data set whose rows are conversations, seen through a slice, alone, mixed or in sequence.

A conversation is the dict that ``nanochat_jax.text.chat_format`` renders; tasks add what their own ``evaluate`` needs
(``letters``, ``entry_point``, ...). Orders are the reference's to the row: a data set is permuted by NumPy's
``default_rng(42)`` (what the ``datasets`` library's ``shuffle(seed=42)`` does), a mixture by CPython's ``Random(42)``.
"""

import hashlib
import json
import operator
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Literal, SupportsIndex

import numpy as np

from nanochat_jax.utils.errors import UserError

SEED = 42

STRICT = "strict, as the reference"  # a task's `judge` where its option `strict` is on

Conversation = dict[str, Any]
EvalType = Literal["generative", "categorical"]


class TaskError(UserError, ValueError, AssertionError):
    """A task used wrongly, or a row no conversation can be made of (also an AssertionError: the reference's type)."""


class TaskIndexError(IndexError, AssertionError):
    """An index outside a task (the reference raises AssertionError for mixtures, and nothing for single tasks)."""


class Task:
    """A lazy view of examples ``start, start + step, ...`` below ``stop``, as conversations.

    Subclasses give ``num_examples``, ``get_example``, ``identity``, and, where answers can be judged, ``eval_type`` and
    ``evaluate``. Unlike the reference, ``stop`` is clamped to the data and every index is checked.

    Raises TaskError for a negative start, a stop below start, a step below 1, or a start beyond the data (at ``len``).
    """

    name: str = "task"
    eval_type: ClassVar[EvalType | None] = None
    baseline: ClassVar[float] = 0.0  # the accuracy of guessing
    judge: str | None = None  # how answers are judged, where that can be chosen; results name it
    version: ClassVar[int] = 1  # part of the fingerprint: raise it when the same data give other conversations

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        if start < 0:
            raise TaskError(f"{self.name}: start is {start}; it must be 0 or more")
        if stop is not None and stop < start:
            raise TaskError(f"{self.name}: stop ({stop}) is below start ({start})")
        if step < 1:
            raise TaskError(f"{self.name}: step is {step}; it must be 1 or more")
        self.start, self.stop, self.step = start, stop, step

    def num_examples(self) -> int:
        """Examples of the full data set, before slicing."""
        raise NotImplementedError

    def get_example(self, index: int) -> Conversation:
        """Example ``index`` of the full data set, in its shuffled order."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What, besides the slice, decides the conversations (JSON-able)."""
        raise NotImplementedError

    def _positions(self) -> range:
        count = self.num_examples()
        if self.start > count:
            raise TaskError(f"{self.name}: start ({self.start}) is beyond its {count} examples")
        return range(self.start, count if self.stop is None else min(self.stop, count), self.step)

    def __len__(self) -> int:
        return len(self._positions())

    def _position(self, index: SupportsIndex) -> int:
        """Position in the full data set of example ``index`` of the slice."""
        try:
            number = operator.index(index)
        except TypeError as error:
            raise TaskError(f"{self.name}: an index is a whole number, not {type(index).__name__}") from error
        positions = self._positions()
        if not 0 <= number < len(positions):
            raise TaskIndexError(f"{self.name}: there is no example {number}; it has {len(positions)}")
        return positions[number]

    def __getitem__(self, index: SupportsIndex) -> Conversation:
        return self.get_example(self._position(index))

    def __iter__(self) -> Iterator[Conversation]:
        return (self.get_example(position) for position in self._positions())

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 that is equal exactly when source, options, slice and so all conversations are."""
        positions = self._positions()
        content = {
            "task": self.name,
            "version": self.version,
            "slice": [positions.start, positions.stop, positions.step],
            **self.identity(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether ``completion`` answers the conversation's question. NotImplementedError for training-only tasks."""
        raise NotImplementedError(f"{self.name} is for training only; it cannot judge answers")

    def reward(self, conversation: Conversation, completion: str) -> float:
        """The reward of reinforcement learning, 1 or 0: whether the completion is right."""
        return float(self.evaluate(conversation, completion))

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self)} conversations>"


class _Combined(Task):
    """Several tasks as one; position ``i`` of their concatenation is found by the running sums of their lengths."""

    def __init__(self, tasks: Sequence[Task], start: int = 0, stop: int | None = None, step: int = 1):
        super().__init__(start, stop, step)
        if not tasks:
            raise TaskError(f"a {self.name} needs at least one task")
        self.tasks = list(tasks)
        self.lengths = [len(task) for task in self.tasks]
        self._ends = list(accumulate(self.lengths))

    def num_examples(self) -> int:
        return self._ends[-1]

    def _concatenated(self, position: int) -> int:
        return position

    def _locate(self, position: int) -> tuple[int, int]:
        place = self._concatenated(position)
        task = bisect_right(self._ends, place)
        return task, place - (self._ends[task - 1] if task else 0)

    def get_example(self, index: int) -> Conversation:
        task, local = self._locate(index)
        return self.tasks[task][local]

    def identity(self) -> dict[str, Any]:
        return {"parts": [task.fingerprint() for task in self.tasks]}


class TaskMixture(_Combined):
    """All rows of several tasks in one fixed random order; a task given twice counts twice.

    The order is that of ``random.Random(42).shuffle`` on the concatenation: it depends on the lengths alone.
    """

    name = "mixture"

    def __init__(self, tasks: Sequence[Task], start: int = 0, stop: int | None = None, step: int = 1):
        super().__init__(tasks, start, stop, step)
        # Shuffling numbers moves them exactly as it would move (task, index) pairs, in a fraction of the memory.
        order = list(range(self.num_examples()))
        random.Random(SEED).shuffle(order)
        self._order = np.array(order, np.int64)

    def _concatenated(self, position: int) -> int:
        return int(self._order[position])


class TaskSequence(_Combined):
    """Several tasks one after the other (a curriculum)."""

    name = "sequence"


def check_texts(**fields: Any) -> None:
    """Raises TaskError, naming the first field that is no string: text made of a null would be "None"."""
    for name, value in fields.items():
        if not isinstance(value, str):
            raise TaskError(f"{name} is {type(value).__name__}, not a string")


def shuffled_order(count: int) -> np.ndarray:
    """Order of a data set of ``count`` rows: position i holds row ``shuffled_order(count)[i]``."""
    return np.random.default_rng(SEED).permutation(count)


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A multiple choice question in the reference's layout.

    The letter follows its choice, since small models bind it better so, and follows ``=`` without a space, so that it
    is the very token the assistant has to answer with. Letters without a choice are left out.
    """
    lines = [f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=False)]
    return (
        f"Multiple Choice question: {question}\n{''.join(lines)}\nRespond only with the letter of the correct answer."
    )


def mc_conversation(question: str, letters: Sequence[str], choices: Sequence[str], answer: str) -> Conversation:
    """User asks a multiple choice question, assistant answers with nothing but the letter."""
    if len(letters) != len(choices) or answer not in letters:
        raise TaskError(f"{len(choices)} choices, letters {list(letters)} and answer {answer!r} do not go together")
    check_texts(question=question, **{f"choice {letter}": c for letter, c in zip(letters, choices, strict=True)})
    messages = [
        {"role": "user", "content": render_mc(question, letters, choices)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "letters": list(letters)}


def evaluate_letter(conversation: Conversation, completion: str) -> bool:
    """Whether a letter of the conversation is the right one. Raises TaskError for anything but one of its letters."""
    if completion not in conversation["letters"]:
        raise TaskError(f"{completion!r} is none of the letters {conversation['letters']}")
    return completion == conversation["messages"][-1]["content"]


def check_alternation(messages: Any, minimum: int = 2, system: bool = False) -> str | None:
    """Why these are no messages that alternate user, assistant, ..., each with a string content; None if they are.

    ``system`` allows a system message before them; ``minimum`` counts the messages after it.
    """
    if not isinstance(messages, list):
        return f"a {type(messages).__name__}, not a list of messages"
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"message {number} is a {type(message).__name__}, not an object with role and content"
        for key in ("role", "content"):
            if key not in message:
                return f"message {number} has no {key!r} (keys: {', '.join(map(str, message)) or 'none'})"
    offset = 1 if system and messages and messages[0]["role"] == "system" else 0
    if len(messages) - offset < minimum:
        return f"{len(messages) - offset} messages; at least {minimum} are needed"
    for number, message in enumerate(messages):
        expected = "system" if number < offset else ("user", "assistant")[(number - offset) % 2]
        if message["role"] != expected:
            return f"message {number} has role {message['role']!r} where {expected!r} is due"
        if not isinstance(message["content"], str):
            return f"message {number}: content is {type(message['content']).__name__}, not a string"
    return None
