"""Conversations as token ids with a loss mask.

Pure functions: they take the conversation, a function that encodes ordinary text, and a function that gives the
id of a special token. A conversation is ``{"messages": [{"role": ..., "content": ...}, ...]}`` with roles that
alternate user, assistant, user, ...; a system message may come first and is joined to the first user message.
An assistant's content is a string or a list of parts ``{"type": "text" | "python" | "python_output", "text": ...}``;
with ``"weight": 0`` beside it (OpenAI's key) the message is read, but not trained on.

Ids, masks and the *types* of the exceptions equal those of the reference (golden ``render_v1.json``).
"""

from collections.abc import Callable, Sequence
from typing import Any

Encode = Callable[[str], list[int]]
Special = Callable[[str], int]

BOS = "<|bos|>"
USER_START, USER_END = "<|user_start|>", "<|user_end|>"
ASSISTANT_START, ASSISTANT_END = "<|assistant_start|>", "<|assistant_end|>"
PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"
OUTPUT_START, OUTPUT_END = "<|output_start|>", "<|output_end|>"

# Part type -> (opening special, closing special, loss mask). The model must learn to write text and tool calls, but
# not tool results: those are forced into the sequence when it is used.
_PARTS: dict[str, tuple[str | None, str | None, int]] = {
    "text": (None, None, 1),
    "python": (PYTHON_START, PYTHON_END, 1),
    "python_output": (OUTPUT_START, OUTPUT_END, 0),
}

DEFAULT_MAX_TOKENS = 2048


def render_conversation(
    conversation: dict[str, Any], encode: Encode, special: Special, max_tokens: int = DEFAULT_MAX_TOKENS
) -> tuple[list[int], list[int]]:
    """Token ids and loss mask (1 = learn to produce this token) of a conversation, both truncated to ``max_tokens``.

    Every piece of text is encoded on its own: nothing merges across a boundary. The argument is not changed.

    Raises AssertionError for wrong roles or a user message that is no string, IndexError for a conversation without
    messages, ValueError for unknown content or part types, KeyError for a part without ``type`` or ``text``, TypeError
    for a system message whose user message is no string.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}; it must be 0 or more")
    messages = _join_system(conversation["messages"])
    ids, mask = [special(BOS)], [0]

    def add(tokens: list[int], learn: int) -> None:
        ids.extend(tokens)
        mask.extend([learn] * len(tokens))

    for index, message in enumerate(messages):
        expected = "user" if index % 2 == 0 else "assistant"
        role, content = message["role"], message["content"]
        if role != expected:
            raise AssertionError(
                f"message {index} has role {role!r} where {expected!r} is due; roles alternate, starting with 'user'"
            )
        if role == "user":
            if not isinstance(content, str):
                raise AssertionError(
                    f"message {index}: a user's content must be a string, not {type(content).__name__}"
                )
            add([special(USER_START), *encode(content), special(USER_END)], 0)
            continue
        trained_on = 0 if message.get("weight") == 0 else 1
        add([special(ASSISTANT_START)], 0)
        for tokens, learn in _assistant_pieces(content, index, encode, special):
            add(tokens, learn * trained_on)
        add([special(ASSISTANT_END)], trained_on)
    return ids[:max_tokens], mask[:max_tokens]


def _join_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a leading system message folded into the first user message (new list, nothing changed)."""
    if not messages:
        raise IndexError("the conversation has no messages")
    if messages[0]["role"] != "system":
        return list(messages)
    if len(messages) < 2:
        raise IndexError("the conversation has nothing after its system message")
    system, user, *rest = messages
    if user["role"] != "user":
        raise AssertionError(f"a system message must be followed by a user message, not {user['role']!r}")
    for name, content in (("system", system["content"]), ("user", user["content"])):
        if not isinstance(content, str):
            raise TypeError(
                f"a system message and the user message after it must be strings; {name} is {type(content)}"
            )
    return [{**user, "content": system["content"] + "\n\n" + user["content"]}, *rest]


def _assistant_pieces(content: Any, index: int, encode: Encode, special: Special) -> list[tuple[list[int], int]]:
    if isinstance(content, str):
        return [(encode(content), 1)]
    if not isinstance(content, list):
        raise ValueError(
            f"message {index}: unknown content type {type(content)}; a string or a list of parts is needed"
        )
    pieces = []
    for part in content:
        kind, text = part["type"], part["text"]
        if kind not in _PARTS:
            raise ValueError(f"message {index}: unknown part type {kind!r}; known are {', '.join(_PARTS)}")
        opening, closing, learn = _PARTS[kind]
        tokens = encode(text)
        if opening is not None and closing is not None:
            tokens = [special(opening), *tokens, special(closing)]
        pieces.append((tokens, learn))
    return pieces


def render_for_completion(
    conversation: dict[str, Any], encode: Encode, special: Special, max_tokens: int = DEFAULT_MAX_TOKENS
) -> list[int]:
    """Ids that prime the assistant: the conversation without its last (assistant) message, then assistant_start.

    Truncation to ``max_tokens`` comes before assistant_start is appended: the result may hold one token more.
    Raises AssertionError when the last message is not the assistant's; otherwise as ``render_conversation``.
    """
    messages = conversation["messages"]
    if not messages:
        raise IndexError("the conversation has no messages")
    if messages[-1]["role"] != "assistant":
        raise AssertionError(f"the last message must be the assistant's, not {messages[-1]['role']!r}")
    ids, _ = render_conversation({**conversation, "messages": list(messages[:-1])}, encode, special, max_tokens)
    return [*ids, special(ASSISTANT_START)]


def visualize_tokenization(
    ids: Sequence[int], mask: Sequence[int], decode: Callable[[list[int]], str], with_token_id: bool = False
) -> str:
    """The tokens joined by ``|``, green where the mask is 1 and red where it is 0 (terminal colours)."""
    if len(ids) != len(mask):
        raise ValueError(f"{len(ids)} ids but {len(mask)} mask values")
    green, red, gray, reset = "\033[92m", "\033[91m", "\033[90m", "\033[0m"
    shown = []
    for token, learn in zip(ids, mask, strict=True):
        shown.append(f"{green if learn else red}{decode([token])}{reset}")
        if with_token_id:
            shown.append(f"{gray}({token}){reset}")
    return "|".join(shown)
