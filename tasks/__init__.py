"""Data sets presented as conversations: ``load("GSM8K", "test")[0]`` is one; ``TaskMixture`` combines them."""

import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_jax.utils.errors import InputError

if TYPE_CHECKING:
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

# Module by public name: each is imported when it is first used, so that the sandbox starts without NumPy and Arrow.
_MODULES = {
    "ARC": "arc", "MMLU": "mmlu", "GSM8K": "gsm8k", "HumanEval": "humaneval", "SmolTalk": "smoltalk",
    "SpellingBee": "spelling", "SimpleSpelling": "spelling", "CustomJSON": "customjson", "Conversation": "task",
    "EvalType": "task", "Task": "task", "TaskError": "task", "TaskIndexError": "task", "TaskMixture": "task",
    "TaskSequence": "task",
}  # fmt: skip
NAMES = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SmolTalk", "SpellingBee", "SimpleSpelling")
# The six of ChatCORE, in the reference's order.
CHAT_EVALS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")


def load(name: str, split: str, task_data: str | Path | None = None, **options: Any) -> "Task":
    """The task ``name`` (one of NAMES); ``options`` go to its class (``start``, ``stop``, ``step``, ``size``, ...).

    Rows come from the folder ``task_data``, or (None) from the base directory, fetched once (``tasks.hub``). The test
    split of SpellingBee has the reference's 256 examples unless ``size`` says otherwise.

    Raises ValueError for an unknown name (naming the nearest), split or option value, FileNotFoundError or FetchError
    for data that cannot be had.
    """
    if name not in NAMES:
        lower = {known.lower(): known for known in NAMES}
        nearest = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.0)
        raise InputError(f"unknown task {name!r}; did you mean {lower[nearest[0]]}? (there are {', '.join(NAMES)})")
    if name == "SpellingBee" and split == "test":
        options.setdefault("size", SPELLING_TEST_SIZE)
    if name.startswith("ARC-"):
        options["subset"] = name
    return __getattr__(name.partition("-")[0])(split=split, task_data=task_data, **options)


def __getattr__(name: str) -> Any:
    """A class by its public name, for `tasks.ARC` and the like."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
