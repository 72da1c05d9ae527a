"""Data sets presented as conversations: ``load("GSM8K", "test")[0]`` is one; ``task.TaskMixture`` combines them."""

import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_jax.utils.errors import InputError

if TYPE_CHECKING:
    from tasks.task import Task

# The reference evaluates this many SpellingBee examples.
SPELLING_TEST_SIZE = 256

# Module and class by name: imported when first used, so that the sandbox starts without NumPy and Arrow.
_CLASSES = {
    "ARC-Easy": ("arc", "ARC"), "ARC-Challenge": ("arc", "ARC"), "MMLU": ("mmlu", "MMLU"), "GSM8K": ("gsm8k", "GSM8K"),
    "HumanEval": ("humaneval", "HumanEval"), "SmolTalk": ("smoltalk", "SmolTalk"),
    "SpellingBee": ("spelling", "SpellingBee"), "SimpleSpelling": ("spelling", "SimpleSpelling"),
}  # fmt: skip
NAMES = tuple(_CLASSES)
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
    module, kind = _CLASSES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(split=split, task_data=task_data, **options)
