"""CORE prompts: which items are shots, the exact text of every prompt, and which of its tokens are scored.

CORE is the in-context-learning score of DCLM (arXiv:2406.11794) over 22 tasks of three kinds. Everything here is fixed
by the reference to the last newline and random seed: a score only means something if the prompts are the same.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat_jax.utils.errors import InputError, UserError

MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING = "multiple_choice", "schema", "language_modeling"
# What an item of each kind must have; scores of the first two compare the options, the third asks for an exact match.
FIELDS = {
    MULTIPLE_CHOICE: ("query", "choices", "gold"),
    SCHEMA: ("context_options", "continuation", "gold"),
    LANGUAGE_MODELING: ("context", "continuation"),
}

Item = dict[str, Any]
Encode = Callable[[list[str]], list[np.ndarray]]


@dataclass(frozen=True)
class Spans:
    """What is scored of one item: `tokens[i][starts[i]:ends[i]]` of every row, given what comes before.

    One row for every option of multiple choice and schema items, one for language modeling.
    """

    tokens: list[np.ndarray]
    starts: list[int]
    ends: list[int]


class NotAPrefixError(UserError, ValueError):
    """The prompt's tokens are not the first tokens of prompt and continuation, so no span can be told apart."""


def item_order(n: int, max_items: int = -1) -> list[int]:
    """Positions in the file of the items evaluated, in order: shuffled with a fixed seed, then cropped if asked."""
    order = list(range(n))
    random.Random(1337).shuffle(order)
    return order[:max_items] if max_items > 0 else order


def fewshot_indices(n: int, index: int, num_fewshot: int) -> list[int]:
    """Which of n items are shown before item `index`, in the order shown.

    n and all indices refer to the items evaluated, so cropping a task changes its shots. Raises ValueError where there
    are too few other items.
    """
    if num_fewshot > n - 1:
        raise InputError(f"{num_fewshot} shots need at least {num_fewshot + 1} items, there are {n}; evaluate more")
    others = [i for i in range(n) if i != index]
    return random.Random(1234 + index).sample(others, num_fewshot)


def build_prompts(kind: str, item: Item, shots: Sequence[Item], delimiter: str = " ") -> list[str]:
    """The prompts of one item: one for every option, or for language modeling (without, with) its continuation.

    The text without continuation is stripped as a whole (a trailing space would be a token of its own), the other is
    not: that is how the reference does it, and why the two may differ in tokens (`find_spans`).
    """
    before = "".join(_shot(kind, shot, delimiter) + "\n\n" for shot in shots)
    if kind == MULTIPLE_CHOICE:
        return [f"{before}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if kind == SCHEMA:
        return [f"{before}{option}{delimiter}{item['continuation']}" for option in item["context_options"]]
    without = f"{before}{item['context'].strip()}{delimiter}"
    return [without.strip(), without + item["continuation"]]


def _shot(kind: str, item: Item, delimiter: str) -> str:
    if kind == MULTIPLE_CHOICE:
        return f"{item['query']}{delimiter}{item['choices'][item['gold']]}"
    if kind == SCHEMA:
        return f"{item['context_options'][item['gold']]}{delimiter}{item['continuation']}"
    return f"{item['context'].strip()}{delimiter}{item['continuation']}"


def find_spans(kind: str, tokens: list[np.ndarray]) -> Spans:
    """The rows to score and their spans, from the tokens of an item's prompts.

    Options are compared by what follows their common first tokens (multiple choice) or by their common last tokens
    (schema, whose options differ before them). Raises NotAPrefixError for language modeling.
    """
    ends = [len(row) for row in tokens]
    if kind == MULTIPLE_CHOICE:
        return Spans(tokens, [common_length(tokens)] * len(tokens), ends)
    if kind == SCHEMA:
        shared = common_length([row[::-1] for row in tokens])
        return Spans(tokens, [end - shared for end in ends], ends)
    without, whole = tokens
    if len(without) >= len(whole) or common_length(tokens) < len(without):
        raise NotAPrefixError("the prompt's tokens are not the first tokens of the prompt with its continuation")
    return Spans([whole], [len(without)], [len(whole)])


def common_length(rows: Sequence[np.ndarray | Sequence[int]]) -> int:
    """How many first tokens all rows share, at most the length of the shortest."""
    shortest = min(len(row) for row in rows)
    table = np.stack([np.asarray(row[:shortest]) for row in rows])
    differs = (table != table[:1]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest
