"""The keyboard and the screen: messages of several lines, their history, streamed answers, Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from nanochat_jax.terminal.commands import NAMES, Leave, Regenerate, obey
from nanochat_jax.terminal.session import Chat, Reply
from nanochat_jax.text.detokenizer import Piece, PlainText, Text, ToolResult
from nanochat_jax.utils import paths

HISTORY_LINES = 2000
BOLD, DIM, CYAN, PLAIN = "\033[1m", "\033[2m", "\033[36m", "\033[0m"
_WAITING = "..."

# A model may write any byte: what would steer the terminal (escape, carriage return, bell) is shown as a picture.
_HARMLESS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {127: 0x2421}
_HARMLESS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass(frozen=True)
class Message:
    """What was entered. verbatim: between triple quotes or from a pipe, so never a command."""

    text: str
    verbatim: bool = False


def read_message(read_line: Callable[[str], str]) -> Message:
    """One message: a line, lines that end in a backslash and the one after, or everything between triple quotes.

    read_line(continuing): gives the next line without its end; "" is passed for the first line, "..." for others.
    Raises what read_line raises (KeyboardInterrupt, and EOFError where there is no first line).
    """
    line = read_line("")
    verbatim = line.lstrip().startswith('"""')
    text = line.lstrip()[3:] if verbatim else line
    with contextlib.suppress(EOFError):  # the end of the input ends the message
        while not text.rstrip().endswith('"""') if verbatim else text.endswith("\\"):
            text = (text if verbatim else text[:-1]) + "\n"
            text += read_line("...")
    if verbatim:
        return Message(text.rstrip().removesuffix('"""').strip("\n"), verbatim)
    return Message(text.strip())


class Screen:
    """Where answers go. decorated: someone watches a terminal, so tool calls are coloured (unless NO_COLOR is set) and
    control characters shown as pictures; otherwise the text alone, as the model wrote it."""

    def __init__(self, out: TextIO, decorated: bool):
        self.out, self.decorated = out, decorated
        self._coloured = decorated and not os.environ.get("NO_COLOR")
        self._begin()

    def _begin(self) -> None:
        self._plain, self._waiting, self._after_result = PlainText(), False, False

    def write(self, text: str) -> None:
        """As it is, at once."""
        self.out.write(text)
        self.out.flush()

    def styled(self, code: str, text: str) -> str:
        """The text as BOLD, DIM or CYAN, where there are colours."""
        return f"{code}{text}{PLAIN}" if text and self._coloured else text

    def wait(self) -> None:
        """Shows that an answer is being prepared, until it comes."""
        self._begin()
        if self.decorated:
            self.write(self.styled(DIM, _WAITING))
            self._waiting = True

    def pieces(self, pieces: Sequence[Piece]) -> None:
        """More of an answer."""
        for piece in pieces:
            closing = self._plain.finish() if isinstance(piece, Text) else ""
            text = self._plain.push([piece])
            if self.decorated:
                closing, text = closing.translate(_HARMLESS), text.translate(_HARMLESS)
                if not isinstance(piece, Text):
                    text = self.styled(CYAN, text)
                elif self._after_result and not text[0].isspace():  # models often write on without a space
                    text = " " + text
                closing = self.styled(CYAN, closing)
            self._after_result = isinstance(piece, ToolResult)
            self._came()
            self.out.write(closing + text)
        self.out.flush()

    def end(self) -> None:
        """The answer is complete (or will not be)."""
        self._came()
        self.write(self._plain.finish())
        self._begin()

    def _came(self) -> None:
        if self._waiting:
            n = len(_WAITING)
            self.out.write("\b" * n + " " * n + "\b" * n)
            self._waiting = False


@contextlib.contextmanager
def interrupts(chat: Chat) -> Iterator[None]:
    """The first Ctrl-C asks the answer to stop instead of tearing up whatever Python is doing; the second leaves."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        if chat.stopping.is_set():
            raise KeyboardInterrupt
        chat.stopping.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ask(chat: Chat, screen: Screen, question: str | None) -> bool:
    """A question and its answer (None: the last question again), ended by a newline.

    False, with the reason on the screen or on stderr, if it cannot be asked. A second Ctrl-C raises Leave.
    """
    chat.stopping.clear()
    try:
        with interrupts(chat):
            if chat.completing:
                shown = chat.asked if question is None else question
                screen.write(screen.styled(BOLD, shown.translate(_HARMLESS) if screen.decorated else shown))
            elif screen.decorated:
                screen.write("Assistant: ")
            screen.wait()
            outcome = chat.regenerate(screen.pieces) if question is None else chat.answer(question, screen.pieces)
    except ValueError as error:
        screen.end()
        print(f"error: {error}", file=screen.out if screen.decorated else sys.stderr)
        return False
    except KeyboardInterrupt:
        screen.end()
        raise Leave from None
    screen.end()
    remarks = _remarks(outcome, chat) if screen.decorated else ()
    screen.write("".join(f" {screen.styled(DIM, f'[{remark}]')}" for remark in remarks) + "\n")
    return True


def _remarks(outcome: Reply, chat: Chat) -> Iterator[str]:
    if outcome.reason == "length" and outcome.n_tokens >= chat.settings.max_tokens:
        yield f"cut at {outcome.n_tokens} tokens; /maxtokens N for longer answers"
    elif outcome.reason == "length":
        yield f"cut: the model's context of {chat.engine.capacity} tokens is full"
    if outcome.reason == "cancelled":
        yield "stopped"
    if outcome.dropped:
        yield f"{outcome.dropped} old exchange{'s' if outcome.dropped > 1 else ''} left out: the context is full"


def converse(chat: Chat, screen: Screen, read: Callable[[], Message]) -> bool:
    """Reads messages and answers until the end of the input or a command to leave.

    True if all could be answered. An interrupt while nothing is being answered leaves if it comes twice in a row.
    """
    fine, warned = True, False
    while True:
        try:
            message = read()
            warned = False
            said = "" if not message.text.strip() else None if message.verbatim else obey(chat, message.text)
            if said is not None:
                screen.write(said + "\n" if said else "")
            else:
                fine &= ask(chat, screen, message.text)
        except Regenerate:
            fine &= ask(chat, screen, None)
        except (EOFError, Leave):
            break
        except KeyboardInterrupt:
            if warned or not screen.decorated:
                break
            warned = True
            screen.write("\n" + screen.styled(DIM, "[Ctrl-C again, or /quit, leaves]") + "\n")
    screen.write("\nGoodbye!\n" if screen.decorated else "")
    return fine


def history_path() -> Path:
    """Where the lines a person typed are kept."""
    return paths.base_dir() / "chat_history"


@contextlib.contextmanager
def line_editing() -> Iterator[bool]:
    """Arrow keys, Tab for commands, and a history that outlives the session, for its owner's eyes only.

    Yields whether this is the first session. Where Python lacks readline, or the file cannot be used, input works
    without.
    """
    path = history_path()
    first = not path.exists()
    try:
        import readline
    except ImportError:
        yield first
        return
    gnu = hasattr(readline, "append_history_file")  # macOS has libedit under this name, which lacks it
    readline.set_completer_delims(" ")
    readline.set_completer(_complete)
    readline.parse_and_bind("tab: complete" if gnu else "bind ^I rl_complete")
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_RDONLY, 0o600))
        os.chmod(path, 0o600)
        readline.read_history_file(path)
    before = readline.get_current_history_length()
    try:
        yield first
    finally:
        with contextlib.suppress(OSError):
            if gnu:  # appended: two chats at once do not overwrite each other
                readline.append_history_file(readline.get_current_history_length() - before, path)
                _shorten(path)
            else:
                readline.set_history_length(HISTORY_LINES)
                readline.write_history_file(path)


def _complete(word: str, n: int) -> str | None:
    """The n-th command that begins with a word."""
    found = [f"/{name}" for name in NAMES if word.startswith("/") and f"/{name}".startswith(word.lower())]
    return found[n] if n < len(found) else None


def _shorten(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    if len(lines) > 2 * HISTORY_LINES:
        paths.write_atomic(path, b"".join(lines[-HISTORY_LINES:]))
        os.chmod(path, 0o600)
