"""One JSON value of the user's own as a conversation: the shapes that are read, what is refused, what is said.

null means absent, at every level: libraries that merge files fill every key that any of them has. A key that changes
what a conversation means is obeyed (``weight``, ``history``, a second field of the question, ...) or refused; all
others that are not read are counted by name, so that nothing is dropped unsaid.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeGuard

from nanochat_jax.data.conversation_rows import check_contents
from nanochat_jax.text import chat_format as rendering
from nanochat_jax.utils.errors import InputError

SHAPES = """\
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
  {"prompt": "...", "completion": "..."}  (or instruction, input / output; or question, context / answer)
  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}"""

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_LISTS = ("messages", "conversations", "conversation")
# Where a question, what else belongs to it, and its answer may stand, in order of preference.
_QUESTIONS = ("prompt", "instruction", "question", "query")
_SECOND = (
    "input", "inputs", "context", "contexts", "passage", "document", "article", "paragraph", "story", "background",
    "knowledge",
)  # fmt: skip
_ANSWERS = ("completion", "output", "response", "answer")
_SYSTEMS = ("system", "system_prompt", "system_message")
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
_TEXT_PARTS = ("text", "input_text", "output_text")

# Whether a message is trained on, as OpenAI, axolotl, ms-swift, mistral-finetune and torchtune write it.
_TRAIN = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale", "train_on_turn")
_MASKED = ("masked",)
# What cannot be trained on here, and may not be left out of what is.
_MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio")
_TOOLS = ("tools", "functions", "tool_calls", "tool_call", "function_call", "tool_call_id", "tool_responses")
_REFUSED_IN_MESSAGE = (
    *_TOOLS, *_MEDIA, "file", "refusal", "reasoning_content", "reasoning", "thinking", "train_detail", "ipython",
)  # fmt: skip
_REFUSED = (*_TOOLS, *_MEDIA, "rejected", "rejected_response", "non_preferred_output")
_NOTHING_WRITTEN = ("", "[]", "{}", "null", "None")  # as a string, which may hold JSON


def to_conversation(value: Any, ignored: Counter[str] | None = None) -> dict[str, Any]:
    """``{"messages": [...]}`` from a JSON value of any accepted shape: roles translated, an empty system left out.

    A message of the assistant that is not to be trained on has ``"weight": 0``. ignored: counts the keys not read.

    Raises ValueError with the reason when the value has none of the shapes, or roles, contents or keys that cannot be
    used.
    """
    unread = _Unread()
    messages = [_message(number, message, unread) for number, message in enumerate(_messages(value, unread))]
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        del messages[0]
    conversation = {"messages": messages}
    try:
        check_contents(conversation)
        rendering.render_conversation(conversation, lambda text: [], lambda name: 0)
    except (AssertionError, LookupError, TypeError) as error:
        raise InputError(f"no key {error}" if isinstance(error, KeyError) else str(error)) from error
    said = [message for message in messages if message["role"] == "assistant"]
    if not said:
        raise InputError("there is no message of the assistant, so nothing to learn")
    if all(message.get("weight") == 0 for message in said):
        raise InputError("every message of the assistant has weight 0, so there is nothing to learn")
    if ignored is not None:
        ignored.update(unread.keys)
    return conversation


class _Unread:
    """The keys of one conversation that nothing reads, each once."""

    def __init__(self):
        self.keys: set[str] = set()

    def note(self, value: dict[str, Any], read: Sequence[str], where: str = "") -> None:
        self.keys.update(where + key for key, held in value.items() if not _nothing(held) and key not in read)


def _nothing(value: Any) -> bool:
    """Whether it is null or holds nothing; 0 and false are something."""
    return value is None or (isinstance(value, list | dict) and not value) or (_is_text(value) and not value.strip())


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str)


def _chosen(value: dict[str, Any], keys: Sequence[str]) -> str | None:
    """The first of the keys that holds something, else the first that is there."""
    there = [key for key in keys if value.get(key) is not None]
    return next((key for key in there if not _nothing(value[key])), there[0] if there else None)


def _refuse(value: dict[str, Any], keys: Sequence[str], what: str) -> None:
    for key in keys:
        held = value.get(key)
        if not (_nothing(held) or held is False or (isinstance(held, str) and held.strip() in _NOTHING_WRITTEN)):
            raise InputError(f"{what} has {key!r}, which cannot be trained on: take it out, or put it into the text")


def _weight(value: dict[str, Any], what: str) -> int | None:
    """0 or 1 as the keys say that decide about training; None where none does."""
    found = []
    for keys, meaning in ((_TRAIN, 1), (_MASKED, 0)):
        for key in keys:
            held = value.get(key)
            if held is None:
                continue
            if not isinstance(held, bool | int | float) or held not in (0, 1):
                raise InputError(f"{what} has {key!r}: {held!r}; only 0 and 1 (false and true) can be obeyed")
            found.append(int(held == meaning))
    return min(found, default=None)


# --- a conversation ---------------------------------------------------------------------------------------------------


def _messages(value: Any, unread: _Unread) -> list[Any]:
    """The messages as they are written, null ones left out."""
    if isinstance(value, list):
        return [message for message in value if message is not None]
    if not isinstance(value, dict):
        raise InputError(f"a JSON {_kind(value)} is no conversation")
    _refuse(value, _REFUSED, "the conversation")
    for key in ("label", "kto_tag"):
        if value.get(key) is False:
            raise InputError(f"{key!r} is false: the conversation is an example of what not to say")
    if _ROLES.get(str(value.get("mask")).lower()) == "assistant":
        raise InputError("'mask' names the assistant: there is nothing to learn")
    key = _chosen(value, _LISTS)
    if key is not None:
        read = (key, *_SYSTEMS)
        if not isinstance(value[key], list):
            raise InputError(f"{key!r} holds a {_kind(value[key])}, not a list of messages")
        messages = [message for message in value[key] if message is not None]
    else:
        messages, read = _pair(value)
        read = (*read, *_SYSTEMS)
    messages = _with_system(value, messages)
    weight, decides = _whole_weight(value)
    unread.note(value, (*read, *decides))
    if weight == 0:
        messages = [{**message, "weight": 0} if isinstance(message, dict) else message for message in messages]
    return messages


def _whole_weight(value: dict[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """The weight of a whole conversation, and the keys that say it. There "loss" may be a figure somebody measured."""
    keys = tuple(k for k in (*_TRAIN, *_MASKED) if isinstance(value.get(k), bool) or (k == "weight" and k in value))
    return _weight({key: value[key] for key in keys}, "the conversation"), keys


def _with_system(value: dict[str, Any], messages: list[Any]) -> list[Any]:
    key = _chosen(value, _SYSTEMS)
    if key is None or _nothing(value[key]):
        return messages
    if not isinstance(value[key], str):
        raise InputError(f"{key!r} is a {_kind(value[key])}, not a string")
    system = {"role": "system", "content": value[key]}
    if messages and isinstance(messages[0], dict) and _role(messages[0]) == "system":
        own = messages[0].get(_chosen(messages[0], _CONTENT_KEYS) or "")
        return messages if own == value[key] else [system, *messages]  # two different ones are refused by the renderer
    return [system, *messages]


def _pair(value: dict[str, Any]) -> tuple[list[Any], tuple[str, ...]]:
    """One question and its answer, after the history if there is one, and the keys that were read."""
    question, answer = _chosen(value, _QUESTIONS), _chosen(value, _ANSWERS)
    if question is None and answer is not None:
        question = _chosen(value, _SECOND[:1])
    if question is None or answer is None:
        lacks = "no answer beside the question" if question else "no conversation"
        keys = ", ".join(list(value)[:8])
        raise InputError(f"{lacks} (keys: {keys}); known are messages, conversations, or a pair as prompt, completion")
    asked, answered = value[question], value[answer]
    more = [key for key in (*_QUESTIONS, *_SECOND) if key != question and not _nothing(value.get(key))]
    read = (question, answer, "history", *more)
    for key in ("choices", "options"):
        if isinstance(value.get(key), list | dict) and value[key]:
            raise InputError(f"{key!r} belongs to the question: write it into the question's text")
    if isinstance(asked, list):
        if more:
            raise InputError(f"{question!r} is a list, so {more[0]!r} has no place beside it")
        messages = asked if _are_messages(asked) else [{"role": "user", "content": asked}]
    else:
        messages = [{"role": "user", "content": _joined(value, question, more)}]
    if not _are_messages(answered):
        answered = [{"role": "assistant", "content": answered}]
    return [*_history(value.get("history")), *messages, *answered], read


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and _role(value[0]) is not None


def _joined(value: dict[str, Any], first: str, more: Sequence[str]) -> str:
    """The fields of a question, one after the other. A prompt that holds another first field is a rendering of all."""
    for key in (first, *more):
        if not isinstance(value[key], str):
            raise InputError(f"{key!r} is a {_kind(value[key])}, not a string")
    asked = value[first]
    if first == "prompt" and any(key in _QUESTIONS and value[key] in asked for key in more):
        more = [key for key in more if value[key] not in asked]
    return "\n\n".join([asked, *(value[key] for key in more)])


def _history(history: Any) -> list[Any]:
    """Earlier exchanges: pairs of strings, or messages."""
    if _nothing(history):
        return []
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return history
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise InputError("'history' is neither a list of [question, answer] nor one of messages")
    pairs = [(*zip(("user", "assistant"), turn, strict=True),) for turn in history]
    return [{"role": role, "content": text} for pair in pairs for role, text in pair]


# --- a message --------------------------------------------------------------------------------------------------------


def _role(message: dict[str, Any]) -> str | None:
    """The role that is written, translated; None if it is not known."""
    role = message.get(_chosen(message, _ROLE_KEYS) or "")
    return _ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def _message(number: int, message: Any, unread: _Unread) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InputError(f"message {number} is a JSON {_kind(message)}, not an object with role and content")
    role = _role(message)
    if role is None:
        written = message.get(_chosen(message, _ROLE_KEYS) or "")
        raise InputError(f"message {number} has role {written!r}; known are {', '.join(_ROLES)}")
    what = f"message {number} ({role})"
    _refuse(message, _REFUSED_IN_MESSAGE, what)
    if message.get("recipient") not in (None, "", "all") or message.get("channel") not in (None, "", "final"):
        raise InputError(f"{what} is meant for a tool, or is no answer (recipient, channel)")
    key = _chosen(message, _CONTENT_KEYS)
    content = _content(message[key], role, what, unread) if key else ""
    weight = _weight(message, what)
    if role != "assistant" and weight:
        raise InputError(f"{what} asks to be trained on, but only what the assistant says is: take its weight out")
    read = (*_ROLE_KEYS, key or "", *_TRAIN, *_MASKED, "recipient", "channel")
    unread.note(message, read, "messages: ")
    kept = {"role": role, "content": content}
    return {**kept, "weight": 0} if role == "assistant" and weight == 0 else kept


def _content(content: Any, role: str, what: str, unread: _Unread) -> Any:
    """A string, or an assistant's list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{what}: the content is a {_kind(content)}, not a string")
    parts = [_part(part, role, what, unread) for part in content if part is not None]
    if role == "assistant":
        return [part for part in parts if part["text"] or part["type"] != "text"]
    return "".join(part["text"] for part in parts)


def _part(part: Any, role: str, what: str, unread: _Unread) -> dict[str, str]:
    kinds = (*_TEXT_PARTS, *(("python", "python_output") if role == "assistant" else ()))
    if not isinstance(part, dict) or part.get("type") not in kinds:
        shown = part.get("type") if isinstance(part, dict) else part
        raise InputError(f"{what} has a part that is none of {', '.join(kinds)}: {str(shown)[:40]!r}")
    text = part.get("text")
    if not isinstance(text, str) and not (text is None and part["type"] in _TEXT_PARTS):
        raise InputError(f"{what}: a part's text is a {_kind(text)}, not a string")
    _refuse(part, (*_MEDIA, *_TOOLS), f"a part of {what}")
    if part.get("name") not in (None, "", "python", "calculator"):
        raise InputError(f"{what} has a part for {part['name']!r}, which is no tool of this model")
    unread.note(part, ("type", "text", "name"), "parts: ")
    return {"type": "text" if part["type"] in _TEXT_PARTS else part["type"], "text": text or ""}


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
