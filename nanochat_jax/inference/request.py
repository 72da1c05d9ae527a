"""A request to the engine: what was asked, what came of it, and the state machine of its tool calls. No JAX here."""

import operator
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanochat_jax.text import chat_format
from nanochat_jax.utils.errors import InputError


class TextCoder(Protocol):
    """What the engine needs of a tokenizer (`nanochat_jax.text.tokenizer.Tokenizer` has it)."""

    @property
    def bos_id(self) -> int: ...
    def encode_text(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def encode_special(self, name: str) -> int: ...


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that mean something to the engine; -1 where there is none. tokenizer is None where no tool can run."""

    ends: frozenset[int]
    python_start: int = -1
    python_end: int = -1
    output_start: int = -1
    output_end: int = -1
    tokenizer: TextCoder | None = None

    @classmethod
    def of(cls, tokenizer: TextCoder | None) -> "SpecialTokens":
        """Of a tokenizer: bos and assistant_end end a row. A stock tokenizer without the chat tokens has only bos."""
        if tokenizer is None:
            return cls(frozenset())
        try:
            ends = frozenset([tokenizer.bos_id, tokenizer.encode_special(chat_format.ASSISTANT_END)])
            start, end, output_start, output_end = map(tokenizer.encode_special, _TOOL_NAMES)
            return cls(ends, start, end, output_start, output_end, tokenizer)
        except KeyError:
            return cls(frozenset([tokenizer.bos_id]))


_TOOL_NAMES = (chat_format.PYTHON_START, chat_format.PYTHON_END, chat_format.OUTPUT_START, chat_format.OUTPUT_END)


@dataclass(eq=False)
class Request:
    """One row of generation: the handle that `Engine.submit` returns. Read it, do not write it.

    tokens and masks grow as the engine steps: mask 1 = sampled by the model, 0 = put there by the calculator. The end
    token is included. logprobs: of the tokens, where the engine was asked for them. finished: None while running, then
    "end" (an end token), "length" (max_tokens), "cancelled". reused: how many tokens of the prompt were in the cache
    already.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stream: int
    run_on: bool
    number: int
    tokens: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: str | None = None
    ended: bool = False  # has produced an end token; differs from finished only for rows that run on
    reused: int = 0
    # the engine's own
    slot: int = -1
    prefilled: int = 0
    leader: "Request | None" = None  # is computing the beginning of this prompt in another slot, to be copied
    forced: deque[int] = field(default_factory=deque)
    in_tool: bool = False
    expression: list[int] = field(default_factory=list)
    tool: "Future[Any] | None" = None  # the calculator is at work; the row waits

    @property
    def left(self) -> int:
        """How many tokens of the prompt are still to be prefilled: all but the last, which the decode loop is fed."""
        return len(self.prompt) - 1 - self.prefilled

    @property
    def ready(self) -> bool:
        """Whether the row can decode: no tool is awaited and all of the prompt that is to be prefilled has been."""
        return self.left == 0 and self.tool is None

    @property
    def position(self) -> int:
        """How many tokens of the slot are valid: the position of the next token to be fed."""
        return self.prefilled + len(self.tokens)

    def cached_tokens(self) -> list[int]:
        """The tokens whose keys and values are in the slot."""
        return (self.prompt[: self.prefilled + 1] + self.tokens)[: self.position]

    def receive(
        self, column: Sequence[int], special: "SpecialTokens", run_tool: Callable[[str], "Future[Any]"]
    ) -> "Event":
        """Books new tokens up to the one the row stops at, and starts its tool calls (reference section 4.4)."""
        masks: list[int] = []
        for token in column:
            masks.append(0 if self.forced else 1)
            if self.forced:
                self.forced.popleft()
            self.ended |= token in special.ends
            if special.tokenizer is not None:
                self._run_tool_machine(token, special, special.tokenizer, run_tool)
            if self.ended and not self.run_on:
                self.finished = "end"
            elif len(self.tokens) + len(masks) >= self.max_tokens:
                self.finished = "length"
            if self.finished or self.tool is not None:
                break
        tokens = list(column[: len(masks)])
        self.tokens += tokens
        self.masks += masks
        return Event(self, tokens, masks, self.finished)

    def _run_tool_machine(self, token: int, special: "SpecialTokens", tokenizer: TextCoder, run_tool) -> None:
        if token == special.python_start:
            self.in_tool, self.expression = True, []
        elif token == special.python_end and self.in_tool:
            if self.expression:
                self.tool = run_tool(tokenizer.decode(self.expression))
            self.in_tool, self.expression = False, []
        elif self.in_tool:
            self.expression.append(token)

    def take_answer(self, special: "SpecialTokens") -> None:
        """Queues the answer of a tool that is done, as tokens to be fed; one that failed or has none gives nothing."""
        assert self.tool is not None and special.tokenizer is not None
        answer = None if self.tool.exception() else self.tool.result()
        if answer is not None:
            ids = special.tokenizer.encode_text(str(answer))
            self.forced += [special.output_start, *ids, special.output_end]
        self.tool = None


@dataclass(frozen=True)
class Event:
    """What one `Engine.step` added to one request: tokens with their masks, and why it finished, if it did."""

    request: Request
    tokens: list[int]
    masks: list[int]
    finished: str | None


def new_request(
    tokens: Sequence[int],
    vocab_size: int,
    capacity: int,
    max_tokens: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stream: int,
    run_on: bool,
    number: int,
) -> Request:
    """A request for a slot of `capacity` positions, its settings as `Engine.submit` takes them.

    Raises ValueError for settings that cannot work, naming the numbers.
    """
    prompt = _checked_prompt(tokens, vocab_size)
    if not temperature >= 0 or temperature == float("inf"):
        raise InputError(f"temperature must be a finite number >= 0, got {temperature}")
    if top_k is not None and top_k < 0:
        raise InputError(f"top_k must be at least 0 (0 or None = off), got {top_k}")
    if top_p is not None and not 0 <= top_p <= 1:
        raise InputError(f"top_p must lie between 0 and 1 (1 or None = off), got {top_p}")
    room = capacity - len(prompt) + 1  # the last token of an answer is never fed back
    if len(prompt) > capacity:
        raise InputError(f"the prompt has {len(prompt)} tokens, but a slot of this engine holds {capacity}")
    if max_tokens is None:
        max_tokens = room
    if max_tokens < 0:
        raise InputError(f"max_tokens must be at least 0, got {max_tokens}")
    if max_tokens > room:
        raise InputError(
            f"a prompt of {len(prompt)} tokens and max_tokens={max_tokens} do not fit the {capacity} "
            f"positions of a slot: ask for at most {room}, or build the Engine with a larger capacity"
        )
    k, p = min(top_k or 0, vocab_size), 1.0 if top_p is None else float(top_p)
    return Request(prompt, max_tokens, float(temperature), k, p, seed, stream, run_on, number)


def _checked_prompt(tokens: Sequence[int], vocab_size: int) -> list[int]:
    """The prompt as a list of ints. Raises ValueError for an empty one, or ids that the vocabulary does not have."""
    try:
        prompt = [operator.index(token) for token in tokens]
    except TypeError as error:
        raise InputError(f"the prompt must be a list of token ids, not {type(tokens).__name__}: {error}") from None
    if not prompt:
        raise InputError("the prompt is empty: give at least one token, such as bos")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise InputError(
            f"the prompt holds ids from {min(prompt)} to {max(prompt)}; the vocabulary has 0 to {vocab_size - 1}"
        )
    return prompt


def question_seed(seed: int, question: int) -> int:
    """A 32-bit seed for a question in a step's seed (a multiplicative hash: neighbours must not share samples)."""
    return (seed * 0x9E3779B1 + question * 0x85EBCA6B + 0x27D4EB2F) & 0xFFFFFFFF
