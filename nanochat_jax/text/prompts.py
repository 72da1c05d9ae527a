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
    """A conversation that no prompt can be made of. index: the message at fault, counted from 0, or None; field: what
    of it ("content"), or ""."""

    def __init__(self, problem: str, index: int | None = None, field: str = ""):
        super().__init__(problem if index is None else f"message {index}: {f'{field} ' if field else ''}{problem}")
        self.problem, self.index, self.field = problem, index, field


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


def chat_prompt(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, resume: bool = True, prime: bool = True
) -> list[int]:
    """The ids that make the model write the next message: bos, the messages as in training, assistant_start.

    messages: as `alternating` takes them. Special tokens written in a text are plain text. Where the last message is
    the assistant's, the model continues it; with resume=False it is complete, and the model writes another one. prime:
    whether assistant_start follows a complete conversation (False: the model has to write that itself).

    Raises MessageError, naming the message, for what is no conversation, and for a tokenizer without chat tokens.
    """
    system, turns = alternating(messages)
    return _render(system, turns, tokenizer.encode_text, tokenizer, resume, prime)


def fit_history(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    capacity: int,
    reserve: int,
    *,
    resume: bool = True,
    prime: bool = True,
) -> tuple[list[int], int]:
    """(prompt, dropped): `chat_prompt` without as many of the oldest messages as must go.

    capacity: the engine's positions for prompt and completion; reserve: tokens that the completion must have left.
    Whole exchanges go (what the user said and its completion), so dropped is even; neighbouring messages of one role
    count as one. The system's first messages, the newest user message and a message that is to be continued stay.
    Raises ContextOverflow where these alone do not fit, otherwise as `chat_prompt`.
    """
    system, turns = alternating(messages)
    encode = functools.cache(tokenizer.encode_text)

    @functools.cache
    def prompt(exchanges: int) -> list[int]:
        return _render(system, turns[2 * exchanges :], encode, tokenizer, resume, prime)

    def fits(exchanges: int) -> bool:
        return len(prompt(exchanges)) + reserve <= capacity + 1  # a completion's last token needs no position

    n = (len(turns) - 1) // 2  # all but the newest message
    dropped = bisect_left(range(n), True, key=fits)
    # a system message joined to another text may be a token longer there, so the search's guess is checked
    while dropped < n and not fits(dropped):
        dropped += 1
    if not fits(dropped):
        raise ContextOverflow(len(prompt(dropped)), capacity, reserve)
    return prompt(dropped), 2 * dropped


def _render(
    system: str,
    turns: list[dict[str, Any]],
    encode: chat_format.Encode,
    tokenizer: Tokenizer,
    resume: bool,
    prime: bool,
) -> list[int]:
    first, *rest = turns
    whole = {"messages": [{**first, "content": _joined(system, first["content"])}, *rest]}
    try:
        # the cut is for training rows; here every token counts
        ids, _ = chat_format.render_conversation(whole, encode, tokenizer.encode_special, max_tokens=1 << 62)
        if resume and turns[-1]["role"] == "assistant":
            return ids[:-1]  # without assistant_end
        return [*ids, tokenizer.encode_special(chat_format.ASSISTANT_START)] if prime else ids
    except KeyError as error:
        raise MessageError(
            f"this model's tokenizer has no {error.args[0]!r} token: it completes text but holds no conversation"
        ) from None


# --- any conversation as one that training knows ----------------------------------------------------------------------

GAP = "\n\n"  # between texts that are joined, as in training between a system's and a user's
_TEXT_KINDS = (None, "text", "input_text", "output_text")  # the last two: of OpenAI's responses


def alternating(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """(what the system says before all else, the messages as training has them: user, assistant, user, ...).

    messages: ``{"role": "system" | "user" | "assistant", "content": ...}`` in any order ("developer" is another name
    for system). A system's or user's content is a string, or a list of strings and ``{"type": "text", "text": ...}``;
    an assistant's is plain text (see the module), a part list, or None. Other keys are ignored.

    A later system message is a part of what the user says there; neighbouring messages of one role are joined by a
    blank line; a conversation that the assistant begins gets an empty user message before it. The last turn is the
    user's or the assistant's. Raises MessageError, naming the message.
    """
    if not messages:
        raise MessageError("the conversation has no messages: give at least one of a user")
    system, turns = "", []
    for index, message in enumerate(messages):
        role, content = _checked(message, index)
        if role == "system" and not turns:
            system = _joined(system, content)
            continue
        role = "assistant" if role == "assistant" else "user"
        if not turns and role == "assistant":
            turns.append({"role": "user", "content": ""})
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = _joined(turns[-1]["content"], content)
        else:
            turns.append({"role": role, "content": content})
    return system, turns or [{"role": "user", "content": ""}]


def _joined(one: Any, other: Any) -> Any:
    """Two contents of one role, texts or part lists, with a blank line between them unless one is empty."""
    if not one or not other:
        return one or other
    if isinstance(one, str):
        return one + GAP + other
    before, seam = (one[:-1], one[-1]["text"] + GAP) if one[-1]["type"] == "text" else (one, GAP)
    after, seam = (other[1:], seam + other[0]["text"]) if other[0]["type"] == "text" else (other, seam)
    return [*before, {"type": "text", "text": seam}, *after]  # one text, as texts are encoded one by one


def _checked(message: Any, index: int) -> tuple[str, Any]:
    """(role, content) of a message: a string, or an assistant's part list, which holds no empty text."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise MessageError("a message is an object with a role and a content", index)
    role, content = message["role"], message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise MessageError(f"unknown role {role!r}: it must be 'system', 'user' or 'assistant'", index, "role")
    if role == "assistant":
        if content is None or isinstance(content, str):
            return role, parts_of_text(content or "")
        kinds = ("text", "python", "python_output")
        return role, [part for part in _parts(content, kinds, index) if part["text"] or part["type"] != "text"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in _parts(content, ("text",), index))
    return "system" if role == "developer" else role, text


def _parts(content: Any, kinds: Sequence[str], index: int) -> list[dict[str, str]]:
    if not isinstance(content, list):
        kind = "null" if content is None else type(content).__name__
        raise MessageError(f"must be text or a list of parts, not {kind}", index, "content")
    parts = []
    for n, part in enumerate(content):
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, Mapping) else ""
        kind = "text" if kind in _TEXT_KINDS else kind
        if kind not in kinds or not isinstance(part.get("text"), str):
            expected = f"{{'type': {' | '.join(map(repr, kinds))}, 'text': string}}"
            raise MessageError(f"must be {expected}", index, f"content.{n}")
        parts.append({"type": kind, "text": part["text"]})
    return parts
