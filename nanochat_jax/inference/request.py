"""What is asked of the engine, what comes of it, and the state machine of its tool calls. No JAX here."""

import operator
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from nanochat_jax.text import chat_format
from nanochat_jax.text.detokenizer import CompletionStream
from nanochat_jax.text.grammar import GrammarState
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.errors import InputError

NO_LIMIT = 1 << 30
MAX_LOGPROBS = 20  # alternatives of a token, as OpenAI's


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one completion are drawn and when it ends. Raises ValueError, naming the field.

    Arguments:
        max_tokens: the most tokens, the calculator's and the end token included; None = to the end of the slot.
        temperature: 0 = always the most likely token.
        top_k: sample among the k most likely tokens; 0 = all.
        top_p: sample among the most likely tokens that together have this probability; 1 = all.
        min_p: sample among the tokens at least so many times as likely as the most likely one; 0 = all.
        stop: strings that end the completion, which `text` ends before. Looked for in the text between tool calls, up
            to an end token.
        seed: any integer, of which 32 bits count.
        sample_index: which of several samples of one prompt and seed.
        ignore_eos: continue after an end token.
        frequency_penalty, presence_penalty: what a token's logit loses for each time that the completion has had it,
            and once; -2 to 2. repetition_penalty: divides the logits (multiplies negative ones) of what prompt and
            completion have had; 1 = off. logit_bias: (token id, what its logit gains) pairs. All before top_k.
        grammar: what the completion must follow, made and checked by `text.grammar`; complete, it ends.
        return_tool_calls: a call of the calculator ends the completion ("tool"), for the caller to compute.
        begin: tokens that the completion begins with.
        logprobs: also the tokens' log-probabilities under the model, with so many alternatives of each; 0 = without
            any, None = not at all. prompt_logprobs: the same for the prompt's tokens, all but the first.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 42
    sample_index: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None
    return_tool_calls: bool = False
    begin: tuple[int, ...] = ()

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
        for name in ("logprobs", "prompt_logprobs"):
            if (n := getattr(self, name)) is not None and not 0 <= n <= MAX_LOGPROBS:
                raise InputError(f"{name} must lie between 0 and {MAX_LOGPROBS} alternatives, got {n}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must lie between 0 and 1 (0 = all tokens), got {self.min_p:g}")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= (value := getattr(self, name)) <= 2:
                raise InputError(f"{name} must lie between -2 and 2 (0 = off), got {value:g}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise InputError(f"repetition_penalty must be above 0 (1 = off), got {self.repetition_penalty:g}")
        if not all(abs(bias) < float("inf") for _, bias in self.logit_bias):
            raise InputError("logit_bias must hold finite numbers")

    @property
    def adjusts(self) -> bool:
        """Whether the logits are changed before a token is drawn."""
        penalties = self.frequency_penalty, self.presence_penalty, self.repetition_penalty - 1
        return bool(self.logit_bias) or self.grammar is not None or any(penalties)


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

    tokens, masks, logprobs and alternatives as in `Request`; the end token is included, in `text` it is not. text:
    decoded with tool calls and their results, up to a stop string ("" for an engine without a tokenizer).
    finish_reason: "end" (an end token), "stop" (a stop string, a grammar's end), "tool" (a call that the caller is to
    compute), "length" (max_tokens) or "cancelled".
    """

    prompt: list[int]
    tokens: list[int]
    masks: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass(eq=False)
class Request:
    """One row of generation: the handle that `Engine.submit` returns. Read it, do not write it.

    tokens and masks grow as the engine steps: mask 1 = sampled by the model, 0 = put there by the calculator. The end
    token is included. logprobs: of the tokens, where they were asked for; alternatives: of each token (id,
    log-probability) of the most likely ones, as many as were asked for; prompt_...: the same of the prompt from its
    second token on. finished: None while running, then a
    completion's finish_reason. reused: how many tokens of the prompt were in the cache already.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int  # of params, or what fits the slot
    number: int  # counts the engine's requests
    stop_detector: CompletionStream | None = None
    tokens: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    finished: str | None = None
    ended: bool = False  # has produced an end token; differs from finished only where those are ignored
    reused: int = 0
    # the engine's own
    slot: int = -1
    prefilled: int = 0
    grammar: GrammarState | None = None
    adjustments: Any = None  # `adjustments.Adjustments` of a row that needs them, made when it is first decoded
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

    @property
    def steps(self) -> int:
        """How many tokens the next decode call may make of it: of one with a grammar those that this forces, and one
        more, after which it has another mask."""
        return len(self.forced) + 1 if self.grammar is not None else NO_LIMIT

    def force(self) -> None:
        """Queues what the grammar leaves no choice about."""
        if self.grammar is not None and not self.forced:
            tokens = self.grammar.forced()
            self.grammar.advance(tokens)
            self.forced += tokens

    def cached_tokens(self) -> list[int]:
        """The tokens whose keys and values are in the slot."""
        return (self.prompt[: self.prefilled + 1] + self.tokens)[: self.position]

    def receive(
        self,
        column: Sequence[int],
        special: "SpecialTokens",
        run_tool: Callable[[str], "Future[Any]"],
        logprobs: Sequence[float] = (),
        alternatives: Sequence[list[tuple[int, float]]] = (),
    ) -> "Event":
        """Books new tokens up to the one the row stops at, with what is known of them, and starts its tool calls
        (reference section 4.4)."""
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
            if self.grammar is not None and masks[-1] and not self.ended:
                self.grammar.advance([token])  # which knows already what it forced
            if self.finished is not None:
                pass  # "tool"
            elif self.ended and not self.params.ignore_eos:
                self.finished = "end"
            elif self.grammar is not None and self.grammar.complete and not self.forced:
                self.finished = "stop"
            elif self.stop_detector is not None and self.stop_detector.stopped:
                self.finished = "stop"
            elif len(self.tokens) + len(masks) >= self.max_tokens:
                self.finished = "length"
            if self.finished or self.tool is not None:
                break
        n = len(masks)
        event = Event(self, list(column[:n]), masks, self.finished, list(logprobs[:n]), list(alternatives[:n]))
        self.tokens += event.tokens
        self.masks += masks
        self.logprobs += event.logprobs
        self.alternatives += event.alternatives
        return event

    def _run_tool_machine(self, token: int, special: "SpecialTokens", tokenizer: Tokenizer, run_tool) -> None:
        if token == special.python_start:
            self.in_tool, self.expression = True, []
        elif token == special.python_end and self.in_tool:
            if self.expression and self.params.return_tool_calls:
                self.finished = "tool"
            elif self.expression:
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
        own = self.prompt, self.tokens, self.masks, self.logprobs
        return Completion(*own, self.finished, text, self.alternatives)

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
    """What one `Engine.step` added to one request: tokens with their masks, and why it finished, if it did; logprobs
    and alternatives of these tokens where they were asked for."""

    request: Request
    tokens: list[int]
    masks: list[int]
    finished: str | None
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)


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
    if params.logit_bias:
        _check_ids([token for token, _ in params.logit_bias], vocab_size, "logit_bias")
    if (params.stop or params.grammar) and tokenizer is None:
        raise InputError("stop strings and grammars need an engine with a tokenizer")
    detector = CompletionStream(tokenizer, params.stop) if params.stop and tokenizer is not None else None
    grammar = GrammarState(params.grammar, tokenizer) if params.grammar and tokenizer is not None else None
    return Request(prompt, params, max_tokens, number, detector, grammar=grammar, forced=deque(params.begin))


def _checked_prompt(tokens: Sequence[int], vocab_size: int) -> list[int]:
    """The prompt as a list of ints. Raises ValueError for an empty one, or ids that the vocabulary does not have."""
    try:
        prompt = [operator.index(token) for token in tokens]
    except TypeError as error:
        raise InputError(f"the prompt must be a list of token ids, not {type(tokens).__name__}: {error}") from None
    if not prompt:
        raise InputError("the prompt is empty: give at least one token, such as bos")
    _check_ids(prompt, vocab_size, "the prompt")
    return prompt


def _check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise InputError(f"{name} holds ids from {min(ids)} to {max(ids)}; the vocabulary has 0 to {vocab_size - 1}")


def question_seed(seed: int, question: int) -> int:
    """A 32-bit seed for a question in a step's seed (a multiplicative hash: neighbours must not share samples)."""
    return (seed * 0x9E3779B1 + question * 0x85EBCA6B + 0x27D4EB2F) & 0xFFFFFFFF
