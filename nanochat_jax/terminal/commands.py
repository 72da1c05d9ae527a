"""What a line that begins with a slash does (and the bare words quit, exit and clear)."""

from collections.abc import Callable
from dataclasses import replace

from nanochat_jax.terminal.session import Chat, saved_chats


class Leave(Exception):
    """The person wants to go."""


class Regenerate(Exception):
    """The newest question is to be answered again."""


# what is typed -> (the setting, its kind, what it means)
_SETTINGS: dict[str, tuple[str, type, str]] = {
    "temperature": (
        "temperature",
        float,
        "how adventurous: 0 = always the most likely token, 1 = the model as it is",
    ),
    "topk": ("top_k", int, "sample among the N most likely tokens, 0 = all"),
    "topp": ("top_p", float, "sample among the most likely tokens that together have this probability, 1 = all"),
    "maxtokens": ("max_tokens", int, "the longest answer, in tokens"),
    "seed": ("seed", int, "another number, another answer"),
}
_ALIASES = {"top_k": "topk", "top_p": "topp", "max_tokens": "maxtokens", "exit": "quit", "?": "help", "new": "clear"}


def obey(chat: Chat, line: str) -> str | None:
    """Obeys a line that is a command and returns what to say; None if it is not one. Raises Leave or Regenerate."""
    word, _, value = line.strip().partition(" ")
    name = word.lower()
    if name in ("quit", "exit", "clear") and not value:
        name = "/" + name
    if not name.startswith("/"):
        return None
    name, value = _ALIASES.get(name[1:], name[1:]), value.strip()
    if name in _SETTINGS:
        return _set(chat, name, value)
    if name not in _COMMANDS:
        return f"There is no command /{name}; /help lists them."
    try:
        return _COMMANDS[name][0](chat, value)
    except (ValueError, OSError) as error:
        return f"{error}"


def _set(chat: Chat, name: str, value: str) -> str:
    field, kind, meaning = _SETTINGS[name]
    if not value:
        return f"{field} is {getattr(chat.settings, field):g} ({meaning})."
    try:
        number = kind(value)
    except ValueError:
        return f"/{name} needs {'a whole number' if kind is int else 'a number'}, such as /{name} 1"
    try:
        chat.settings = replace(chat.settings, **{field: number})
    except ValueError as error:
        return f"{error}; it stays {getattr(chat.settings, field):g}."
    return f"{field} is {number:g} now."


def _help(chat: Chat, _: str) -> str:
    lines = [f"  {'/' + name + ' N':<18}{meaning} (now {getattr(chat.settings, field):g})"
             for name, (field, _, meaning) in _SETTINGS.items()]  # fmt: skip
    lines += [f"  {'/' + (name + ' ' + argument).strip():<18}{meaning}" for name, (_, argument, meaning) in _LISTED]
    lines.append('A line that ends in \\ continues on the next; """ begins and ends a text of several lines.')
    lines.append("Ctrl-C stops the answer; twice leaves.")
    return "\n".join(lines)


def _clear(chat: Chat, _: str) -> str:
    chat.clear()
    return "Conversation cleared."


def _regenerate(chat: Chat, _: str) -> str:
    if chat.settings.temperature == 0:
        return "At temperature 0 the answer would be the same; try /temperature 0.8 first."
    raise Regenerate


def _undo(chat: Chat, _: str) -> str:
    question = chat.undo()
    return "There is nothing to undo." if question is None else f"Forgotten: {question}"


def _save(chat: Chat, value: str) -> str:
    if not value and chat.path is not None:
        value = str(chat.path)
    return f"Saved in {chat.save(value)}"


def _load(chat: Chat, value: str) -> str:
    if chat.completing:
        return "A base model holds no conversation; load one into a chat model (--stage=sft)."
    if not value:
        return f"Saved conversations: {', '.join(saved_chats()) or 'none yet'}. Take one up with /load NAME."
    path = chat.load(value)
    n = len(chat.turns)
    newest = chat.messages()[-2:]
    return f"{path}: {n} exchange{'s' if n > 1 else ''}, the last one:\n" + "\n".join(
        f"{message['role'].capitalize()}: {message['content']}" for message in newest
    )


def _info(chat: Chat, _: str) -> str:
    last = chat.last
    used = 1 + sum(len(turn.tokens) for turn in chat.turns) if last is None else last.context
    said = f"Context: {used} of {chat.engine.capacity} tokens, {len(chat.turns)} exchanges."
    if last is not None and last.n_tokens:
        said += f" The last answer: {last.n_tokens} tokens in {last.seconds:.1f} s"
        said += f" ({last.n_tokens / max(last.seconds, 1e-9):,.0f} tokens/s)."
    return said


def _quit(chat: Chat, _: str) -> str:
    raise Leave


_COMMANDS: dict[str, tuple[Callable[[Chat, str], str], str, str]] = {
    "regen": (_regenerate, "", "another answer to the last question"),
    "undo": (_undo, "", "forget the last question and its answer"),
    "clear": (_clear, "", "forget the conversation (also: clear)"),
    "save": (_save, "NAME", "save the conversation"),
    "load": (_load, "NAME", "resume a saved one; without a name: list them"),
    "info": (_info, "", "how much of the context is used, how fast the last answer came"),
    "help": (_help, "", "this list"),
    "quit": (_quit, "", "leave (also: quit, exit, Ctrl-D)"),
}
_LISTED = list(_COMMANDS.items())

NAMES = sorted([*_SETTINGS, *_COMMANDS])
