"""How a reader's messages become a prompt. No JAX here.

An assistant's message may come back as part lists or as the plain text of `detokenizer.as_text`. There
``<expression=result>`` is a tool call only where the calculator gives exactly that result for that expression;
everything else is the text that it is. So no client can put a wrong result into the model's mouth, and completions that
happen to hold angle brackets survive.
"""

import functools
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from nanochat_jax.text import chat_format
from nanochat_jax.text.calculator import use_calculator
from nanochat_jax.text.detokenizer import Piece, Text, ToolCall, ToolResult, as_parts
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.errors import UserError

_WRITTEN_CALL = re.compile(r"<([^<>=]{1,256})=([^<>=]{1,1100})>")


def parts_of_text(text: str) -> list[dict[str, str]]:
    """The parts of a completion that came back as plain text: the reverse of `as_text` for calls with right results."""
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


class MessageError(UserError, ValueError):
    """A conversation that no prompt can be made of. index: the message at fault, counted from 0, or None."""

    def __init__(self, problem: str, index: int | None = None):
        super().__init__(problem if index is None else f"message {index}: {problem}")
        self.index = index


class ContextOverflow(UserError, ValueError):
    """A prompt of `n_tokens` and a completion of `reserve` tokens do not fit `capacity` positions."""

    def __init__(self, n_tokens: int, capacity: int, reserve: int = 0):
        if reserve:
            needed = f"{n_tokens + reserve} are needed: {n_tokens} in the messages and {reserve} for the completion"
            remedy = "shorten the messages or ask for a shorter completion"
        else:
            needed, remedy = f"there are {n_tokens} in the messages", "shorten the messages"
        super().__init__(f"this model's context is {capacity} tokens, but {needed}; {remedy}")
        self.n_tokens, self.capacity, self.reserve = n_tokens, capacity, reserve


def chat_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """The ids that make the model write the next message: bos, the messages as in training, assistant_start.

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

    capacity: the engine's positions for prompt and completion; reserve: tokens that the completion must have left.
    Whole exchanges go (a user's message and its completion), so dropped is even; the system message and the newest user
    message stay. Raises ContextOverflow where these two alone do not fit, otherwise as `chat_prompt`.
    """
    checked = _checked(messages)
    head = checked[:1] if checked[0]["role"] == "system" else []
    body = checked[len(head) :]
    encode = functools.cache(tokenizer.encode_text)

    @functools.cache
    def prompt(exchanges: int) -> list[int]:
        return _render([*head, *body[2 * exchanges :]], encode, tokenizer)

    def fits(exchanges: int) -> bool:
        return len(prompt(exchanges)) + reserve <= capacity + 1  # a completion's last token needs no position

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
    """The messages as `chat_format` takes them."""
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
