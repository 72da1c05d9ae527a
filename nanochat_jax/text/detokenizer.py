"""What a request's tokens look like to a reader, and how a reader's messages become a prompt. No JAX here.

Shared by the terminal, the chat page and the API. Tokens become pieces: `Text`, `ToolCall` (what the model gave to
the calculator) and `ToolResult` (what the calculator answered). There are two ways to keep an answer and send it back
as an assistant message of a later request:

- part lists, as `nanochat_jax.text.chat_format` takes them: ``as_parts(pieces)``; exact.
- plain text: ``as_text(pieces)`` writes a call and its result as ``<12+30=42>`` (a call that got no result:
  ``<12+>``). On the way back ``<expression=result>`` is a tool call only where the calculator gives exactly that result
  for that expression; everything else is the text that it is. So no client can put a wrong result into the model's
  mouth, and answers that happen to hold angle brackets survive.
"""

import functools
import itertools
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_jax.text import chat_format
from nanochat_jax.text.calculator import use_calculator
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.errors import InputError, UserError


@dataclass(frozen=True)
class Text:
    """Some of what the model says; never empty."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """What the model hands to the calculator; complete, also where the completion ended inside it."""

    expression: str


@dataclass(frozen=True)
class ToolResult:
    """What came back (or what the model made up, where the calculator refused the expression)."""

    text: str


Piece = Text | ToolCall | ToolResult


class AnswerStream:
    """Turns the tokens of one answer into pieces as they come.

    Text is never cut inside a character and never holds a special token's name. It ends at an end token
    (assistant_end, bos) and before the first of the `stop` strings, which are looked for in the text between tool
    calls; text that may be the start of one is held back. How the tokens are spread over the pushes makes no
    difference to the joined text. Works with a stock tokenizer that has no chat tokens.

    Raises ValueError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop must be a list of non-empty strings, got {stop!r}")
        self.stopped = False  # a stop string was met
        self.ended = False  # an end token was met
        self._pieces: list[Piece] = []
        self._stops = tuple(stop)
        self._held = ""
        self._decoder = tokenizer.stream_decoder()
        self._closing: Callable[[str], Piece] | None = None  # inside a tool's block: what it will become
        self._block: list[str] = []
        self._hidden = frozenset(tokenizer.special_tokens.values())
        special = tokenizer.special_tokens.get
        self._ends = {tokenizer.bos_id, special(chat_format.ASSISTANT_END)}
        self._openings = {special(chat_format.PYTHON_START): ToolCall, special(chat_format.OUTPUT_START): ToolResult}
        self._closings = {special(chat_format.PYTHON_END): ToolCall, special(chat_format.OUTPUT_END): ToolResult}

    @property
    def pieces(self) -> list[Piece]:
        """Everything so far, neighbouring texts made one."""
        return _joined(self._pieces)

    @property
    def text(self) -> str:
        """Everything so far as plain text (`as_text`)."""
        return as_text(self._pieces)

    def push(self, tokens: Sequence[int]) -> list[Piece]:
        """The pieces that more tokens complete."""
        new: list[Piece] = []
        for hidden, run in itertools.groupby(tokens, self._hidden.__contains__):
            if self.stopped or self.ended:
                break
            if hidden:
                for token in run:
                    self._mark(token, new)
            else:
                self._add(self._decoder.push(*run), new)
        return self._keep(new)

    def _mark(self, token: int, new: list[Piece]) -> None:
        """A special token: no text, but where something begins or ends."""
        if self.ended:
            return
        if token in self._ends:
            self._close(new)
            self.ended = True
        elif token in self._openings:
            self._close(new)
            self._closing = self._openings[token]
        elif self._closing is not None and self._closings.get(token) is self._closing:
            self._close(new)

    def finish(self) -> list[Piece]:
        """The last pieces: what an unfinished character, a possible stop string or an unfinished tool call left."""
        new: list[Piece] = []
        self._close(new)
        self.ended = True
        return self._keep(new)

    def _keep(self, new: list[Piece]) -> list[Piece]:
        new = _joined(new)
        self._pieces += new
        return new

    def _add(self, text: str, new: list[Piece]) -> None:
        if self._closing is not None:
            self._block.append(text)
            return
        text = self._held + text
        # The match that ends first, as if the text had come one character at a time.
        matches = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if matches:
            self.stopped = True
            shown, self._held = text[: min(matches)[1]], ""
        else:
            held = max((_overlap(text, s) for s in self._stops), default=0)
            shown, self._held = text[: len(text) - held], text[len(text) - held :]
        if shown:
            new.append(Text(shown))

    def _close(self, new: list[Piece]) -> None:
        """Ends what is open: a tool's block, or the text before one."""
        if self.stopped:
            return
        self._add(self._decoder.flush(), new)
        if self._closing is not None:
            inside = "".join(self._block)
            if inside:
                new.append(self._closing(inside))
            self._closing, self._block = None, []
        elif self._held:
            new.append(Text(self._held))
            self._held = ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop` (shorter than all of it)."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same pieces with neighbouring texts made one."""
    joined: list[Piece] = []
    for is_text, group in itertools.groupby(pieces, lambda piece: isinstance(piece, Text)):
        run = list(group)
        joined += [Text(as_text(run))] if is_text else run
    return joined


class PlainText:
    """Pieces as plain text while they come: what `push` and `finish` return joins to `as_text` of all pieces."""

    def __init__(self):
        self._calling = False

    def push(self, pieces: Iterable[Piece]) -> str:
        """More text: a call opens a bracket, its result closes it."""
        out = []
        for piece in pieces:
            match piece:
                case ToolResult(text=text):
                    out.append(f"={text}>" if self._calling else f"<={text}>")
                    self._calling = False
                case ToolCall(expression=expression):
                    out.append(f"{self.finish()}<{expression}")
                    self._calling = True
                case Text(text=text):
                    out.append(self.finish() + text)
        return "".join(out)

    def finish(self) -> str:
        """Closes the bracket of a call that got no result."""
        closing, self._calling = ">" if self._calling else "", False
        return closing


def as_text(pieces: Iterable[Piece]) -> str:
    """Pieces as plain text, tool calls as ``<expression=result>``."""
    plain = PlainText()
    return plain.push(pieces) + plain.finish()


def as_parts(pieces: Iterable[Piece]) -> list[dict[str, str]]:
    """Pieces as an assistant message's content: ``{"type": "text" | "python" | "python_output", "text": ...}``."""
    parts = []
    for piece in _joined(pieces):
        match piece:
            case Text(text=text):
                parts.append({"type": "text", "text": text})
            case ToolCall(expression=expression):
                parts.append({"type": "python", "text": expression})
            case ToolResult(text=text):
                parts.append({"type": "python_output", "text": text})
    return parts


_WRITTEN_CALL = re.compile(r"<([^<>=]{1,256})=([^<>=]{1,1100})>")


def parts_of_text(text: str) -> list[dict[str, str]]:
    """The parts of an answer that came back as plain text: the reverse of `as_text` for calls with right results."""
    pieces: list[Piece] = []
    at = 0
    for match in _WRITTEN_CALL.finditer(text):
        expression, result = match.groups()
        answer = use_calculator(expression)
        if answer is None or str(answer) != result:
            continue
        if match.start() > at:
            pieces.append(Text(text[at : match.start()]))
        pieces += [ToolCall(expression), ToolResult(result)]
        at = match.end()
    if at < len(text):
        pieces.append(Text(text[at:]))
    return as_parts(pieces)


# --- messages to a prompt ---------------------------------------------------------------------------------------------


class MessageError(UserError, ValueError):
    """A conversation that no prompt can be made of. index: the message at fault, counted from 0, or None."""

    def __init__(self, problem: str, index: int | None = None):
        super().__init__(problem if index is None else f"message {index}: {problem}")
        self.index = index


class ContextOverflow(UserError, ValueError):
    """A prompt of `n_tokens` with room for an answer of `reserve` tokens does not fit `capacity` positions."""

    def __init__(self, n_tokens: int, capacity: int, reserve: int = 0):
        if reserve:
            needed = f"{n_tokens + reserve} are needed: {n_tokens} in the messages and {reserve} for the answer"
            remedy = "shorten the messages or ask for a shorter answer"
        else:
            needed, remedy = f"there are {n_tokens} in the messages", "shorten the messages"
        super().__init__(f"this model's context is {capacity} tokens, but {needed}; {remedy}")
        self.n_tokens, self.capacity, self.reserve = n_tokens, capacity, reserve


def chat_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """The ids that make the model write the next answer: bos, the messages as in training, assistant_start.

    messages: ``{"role": "system" | "user" | "assistant", "content": ...}`` ("developer" is another name for system). A
    system message may come first and is joined to the first user message; then user and assistant alternate, the last
    is a user's. A system's or user's content is a string, or a list of ``{"type": "text", "text": ...}``; an
    assistant's is plain text (see the module) or a part list. Special tokens written in a text are plain text.

    Raises MessageError, naming the message, for anything else, and for a tokenizer without chat tokens.
    """
    return _render(_checked(messages), tokenizer.encode_text, tokenizer)


def fit_history(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, capacity: int, reserve: int
) -> tuple[list[int], int]:
    """(prompt, dropped): `chat_prompt` without as many of the oldest messages as must go.

    capacity: the engine's positions for prompt and answer; reserve: tokens of answer there must be room for. Whole
    exchanges go (a user's message and its answer), so dropped is even; the system message and the newest user message
    stay. Raises ContextOverflow where these two alone do not fit, otherwise as `chat_prompt`.
    """
    checked = _checked(messages)
    head = checked[:1] if checked[0]["role"] == "system" else []
    body = checked[len(head) :]
    encode = functools.cache(tokenizer.encode_text)

    @functools.cache
    def prompt(exchanges: int) -> list[int]:
        return _render([*head, *body[2 * exchanges :]], encode, tokenizer)

    def fits(exchanges: int) -> bool:
        return len(prompt(exchanges)) + reserve <= capacity + 1  # an answer's last token needs no position

    n = len(body) // 2  # all but the newest message
    dropped = bisect_left(range(n), True, key=fits)
    # a system message joined to another text may be a token longer there, so the search's guess is checked
    while dropped < n and not fits(dropped):
        dropped += 1
    if not fits(dropped):
        raise ContextOverflow(len(prompt(dropped)), capacity, reserve)
    return prompt(dropped), 2 * dropped


def _render(messages: list[dict[str, Any]], encode: chat_format.Encode, tokenizer: Tokenizer) -> list[int]:
    primed = {"messages": [*messages, {"role": "assistant", "content": ""}]}
    try:
        # the cut is for training rows; here every token counts
        return chat_format.render_for_completion(primed, encode, tokenizer.encode_special, max_tokens=1 << 62)
    except KeyError as error:
        raise MessageError(
            f"this model's tokenizer has no {error.args[0]!r} token: it completes text but holds no conversation"
        ) from None


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as `conversation` takes them."""
    if not messages:
        raise MessageError("the conversation has no messages: give at least one of a user")
    checked: list[dict[str, Any]] = []
    due = "user"
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise MessageError("a message is an object with a role and a content", index)
        role = "system" if message["role"] == "developer" else message["role"]
        if role not in ("system", "user", "assistant"):
            raise MessageError(f"unknown role {role!r}: it must be 'system', 'user' or 'assistant'", index)
        if role == "system" and index > 0:
            raise MessageError("a system message must be the first", index)
        if role != "system":
            if role != due:
                raise MessageError(
                    f"it has role {role!r} where {due!r} is due: user and assistant alternate, starting with a user",
                    index,
                )
            due = "user" if due == "assistant" else "assistant"
        parts = _assistant_content if role == "assistant" else _plain_content
        checked.append({"role": role, "content": parts(message.get("content"), index)})
    if checked[-1]["role"] != "user":
        raise MessageError("the last message must be a user's, so that there is something to answer", len(checked) - 1)
    return checked


def _plain_content(content: Any, index: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MessageError(f"the content must be a string, not {type(content).__name__}", index)
    return "".join(text for _, text in _parts(content, ("text",), index))


def _assistant_content(content: Any, index: int) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return parts_of_text(content)
    if not isinstance(content, list):
        raise MessageError(f"the content must be a string or a list of parts, not {type(content).__name__}", index)
    kinds = ("text", "python", "python_output")
    return [{"type": kind, "text": text} for kind, text in _parts(content, kinds, index)]


def _parts(content: list[Any], kinds: Sequence[str], index: int) -> list[tuple[str, str]]:
    pairs = []
    for n, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            raise MessageError(f"part {n} must be {{'type': {' | '.join(map(repr, kinds))}, 'text': string}}", index)
        pairs.append((part["type"], part["text"]))
    return pairs
