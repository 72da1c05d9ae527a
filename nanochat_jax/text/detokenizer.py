"""What a request's tokens look like to a reader. No JAX here.

Shared by the terminal, the chat page and the API. Tokens become pieces: `Text`, `ToolCall` (what the model gave to the
calculator) and `ToolResult` (what the calculator answered). There are two ways to keep a completion and send it back as
an assistant message of a later request (`text/prompts.py`):

- part lists, as `nanochat_jax.text.chat_format` takes them: ``as_parts(pieces)``; exact.
- plain text: ``as_text(pieces)`` writes a call and its result as ``<12+30=42>`` (a call that got no result:
  ``<12+>``).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nanochat_jax.text import chat_format
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.errors import InputError


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


class CompletionStream:
    """Turns the tokens of one completion into pieces as they come.

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
