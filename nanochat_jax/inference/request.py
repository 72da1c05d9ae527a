"""What is asked of the engine, what comes of it, and the state machine of its tool calls. No JAX here."""

import operator
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from nanochat_jax.text import chat_format
from nanochat_jax.text.detokenizer import CompletionStream
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one completion are drawn and when it ends. Raises ValueError, naming the field.

    Arguments:
        max_tokens: the most tokens, the calculator's and the end token included; None = to the end of the slot.
        temperature: 0 = always the most likely token.
        top_k: sample among the k most likely tokens; 0 = all.
        top_p: sample among the most likely tokens that together have this probability; 1 = all.
        stop: strings that end the completion, which `text` ends before. Looked for in the text between tool calls, up
            to an end token.
        seed: any integer, of which 32 bits count.
        sample_index: which of several samples of one prompt and seed.
        ignore_eos: continue after an end token.
        logprobs: also the tokens' log-probabilities under the model; the engine must have been built with them.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 42
    sample_index: int = 0
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self):
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be a finite number of at least 0, got {self.temperature:g}")
        if self.top_k < 0:
            raise InputError(f"top_k must be at least 0 (0 = all tokens), got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise InputError(f"top_p must lie between 0 and 1 (1 = all tokens), got {self.top_p:g}")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise InputError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")
        if not 0 <= self.sample_index < 1 << 31:
            raise InputError(f"sample_index must lie between 0 and 2**31 - 1, got {self.sample_index}")


DEFAULT_PARAMS = SamplingParams()


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that mean something to the engine; -1 where there is none. tokenizer is None where no tool can run."""

    ends: frozenset[int]
    python_start: int = -1
    python_end: int = -1
    output_start: int = -1
    output_end: int = -1
    tokenizer: Tokenizer | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> "SpecialTokens":
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


@dataclass(frozen=True)
class Completion:
    """What the engine made of a prompt.

    tokens and masks as in `Request`; the end token is included, in `text` it is not. text: decoded with tool calls and
    their results, up to a stop string ("" for an engine without a tokenizer). finish_reason: "end" (an end token),
    "stop" (a stop string), "length" (max_tokens) or "cancelled".
    """

    prompt: list[int]
    tokens: list[int]
    masks: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str


@dataclass(eq=False)
class Request:
    """One row of generation: the handle that `Engine.submit` returns. Read it, do not write it.

    tokens and masks grow as the engine steps: mask 1 = sampled by the model, 0 = put there by the calculator. The end
    token is included. logprobs: of the tokens, where the engine was asked for them. finished: None while running, then
    a completion's finish_reason. reused: how many tokens of the prompt were in the cache already.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int  # of params, or what fits the slot
    number: int  # counts the engine's requests
    stop_detector: CompletionStream | None = None
    tokens: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: str | None = None
    ended: bool = False  # has produced an end token; differs from finished only where those are ignored
    reused: int = 0
    # the engine's own
    slot: int = -1
    prefilled: int = 0
    prefix_donor: "Request | None" = None  # is computing the prefix of this prompt in another slot, to be copied
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
            if self.stop_detector is not None:
                self.stop_detector.push([token])
            if self.ended and not self.params.ignore_eos:
                self.finished = "end"
            elif self.stop_detector is not None and self.stop_detector.stopped:
                self.finished = "stop"
            elif len(self.tokens) + len(masks) >= self.max_tokens:
                self.finished = "length"
            if self.finished or self.tool is not None:
                break
        tokens = list(column[: len(masks)])
        self.tokens += tokens
        self.masks += masks
        return Event(self, tokens, masks, self.finished)

    def _run_tool_machine(self, token: int, special: "SpecialTokens", tokenizer: Tokenizer, run_tool) -> None:
        if token == special.python_start:
            self.in_tool, self.expression = True, []
        elif token == special.python_end and self.in_tool:
            if self.expression:
                self.tool = run_tool(tokenizer.decode(self.expression))
            self.in_tool, self.expression = False, []
        elif self.in_tool:
            self.expression.append(token)

    def completion(self, tokenizer: Tokenizer | None) -> Completion:
        """What came of a finished request."""
        assert self.finished is not None
        text = ""
        if tokenizer is not None:
            text = tokenizer.decode(self.tokens[:-1] if self.finished == "end" else self.tokens)
            text = text[: min((at for stop in self.params.stop if (at := text.find(stop)) >= 0), default=len(text))]
        return Completion(self.prompt, self.tokens, self.masks, self.logprobs, self.finished, text)

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
    params: SamplingParams,
    number: int,
    vocab_size: int,
    capacity: int,
    tokenizer: Tokenizer | None,
) -> Request:
    """A request for a slot of `capacity` positions.

    Raises ValueError for a prompt that cannot work, or `max_tokens` that do not fit, naming the numbers.
    """
    prompt = _checked_prompt(tokens, vocab_size)
    if len(prompt) > capacity:
        raise InputError(f"the prompt has {len(prompt)} tokens, but a slot of this engine holds {capacity}")
    longest = capacity - len(prompt) + 1  # the last token of a completion is never fed back
    max_tokens = longest if params.max_tokens is None else params.max_tokens
    if max_tokens > longest:
        raise InputError(
            f"a prompt of {len(prompt)} tokens and max_tokens={max_tokens} do not fit the {capacity} "
            f"positions of a slot: ask for at most {longest}, or build the Engine with a larger capacity"
        )
    if params.stop and tokenizer is None:
        raise InputError("stop strings need an engine with a tokenizer")
    detector = CompletionStream(tokenizer, params.stop) if params.stop and tokenizer is not None else None
    return Request(prompt, params, max_tokens, number, detector)


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
