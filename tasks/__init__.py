"""Data sets presented as conversations: ``load("GSM8K", "test")[0]`` is one; ``TaskMixture`` combines them."""

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nanochat_jax.utils.errors import InputError
from tasks.arc import ARC
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spelling import SimpleSpelling, SpellingBee
from tasks.task import Conversation, EvalType, Task, TaskError, TaskIndexError, TaskMixture, TaskSequence

__all__ = [
    "ARC",
    "CHAT_EVALS",
    "MMLU",
    "NAMES",
    "Conversation",
    "CustomJSON",
    "EvalType",
    "GSM8K",
    "HumanEval",
    "SimpleSpelling",
    "SmolTalk",
    "SpellingBee",
    "Task",
    "TaskError",
    "TaskIndexError",
    "TaskMixture",
    "TaskSequence",
    "load",
]

# The reference evaluates this many SpellingBee examples.
SPELLING_TEST_SIZE = 256

_TASKS: dict[str, Callable[..., Task]] = {
    "ARC-Easy": partial(ARC, "ARC-Easy"),
    "ARC-Challenge": partial(ARC, "ARC-Challenge"),
    "MMLU": MMLU,
    "GSM8K": GSM8K,
    "HumanEval": HumanEval,
    "SmolTalk": SmolTalk,
    "SpellingBee": SpellingBee,
    "SimpleSpelling": SimpleSpelling,
}
NAMES = tuple(_TASKS)
# The six of ChatCORE, in the reference's order.
CHAT_EVALS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")


def load(name: str, split: str, task_data: str | Path | None = None, **options: Any) -> Task:
    """The task ``name`` (one of NAMES); ``options`` go to its class (``start``, ``stop``, ``step``, ``size``, ...).

    Rows come from the folder ``task_data``, or (None) from the base directory, fetched once (``tasks.hub``). The test
    split of SpellingBee has the reference's 256 examples unless ``size`` says otherwise.

    Raises ValueError for an unknown name (naming the nearest), split or option value, FileNotFoundError or FetchError
    for data that cannot be had.
    """
    if name not in _TASKS:
        lower = {known.lower(): known for known in NAMES}
        nearest = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.0)
        raise InputError(f"unknown task {name!r}; did you mean {lower[nearest[0]]}? (there are {', '.join(NAMES)})")
    if name == "SpellingBee" and split == "test":
        options.setdefault("size", SPELLING_TEST_SIZE)
    return _TASKS[name](split=split, task_data=task_data, **options)
