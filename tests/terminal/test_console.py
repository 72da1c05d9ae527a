"""The terminal chat's commands, screen and keyboard."""

import os
import pty
import re
import select
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

from nanochat_jax.terminal import console
from nanochat_jax.terminal.console import Message, ask, converse, read_message
from tests import children
from tests.chat_fixtures import CALL, END, TOKENIZER, make, screen
from tests.fakes import FakeEngine


def session(chat, *lines, decorated=False, fine=True):
    remaining, where = iter(lines), screen(decorated)

    def read():
        try:
            line = next(remaining)
        except StopIteration:
            raise EOFError from None
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line if isinstance(line, Message) else Message(line)

    assert converse(chat, where, read) == fine
    return where.out.getvalue()


def test_commands_change_the_settings():
    chat = make(FakeEngine(), True)
    assert [console._complete("/t", n) for n in range(4)] == ["/temperature", "/topk", "/topp", None]
    assert console._complete("t", 0) is None and console._complete("/RE", 0) == "/regen"
    lines = ["", "/temperature 0.25", "/topk 7", "/top_p 0.5", "/MaxTokens 12", "/seed -3", "/nonsense", "/topk x"]
    said = session(chat, *lines, "/temperature -1", "/topp 2", "/maxtokens 1.5", "/topk", "/help", "/info")
    s = chat.settings
    assert (s.temperature, s.top_k, s.top_p, s.max_tokens, s.seed) == (0.25, 7, 0.5, 12, -3)
    assert all(word in said for word in ("/nonsense", "/topk", "-1", "0.25", "/maxtokens"))
    for name in ("temperature topk topp maxtokens seed clear regen undo save load info help quit").split():
        assert f"  /{name} " in said
    assert "Context: 1 of 64 tokens" in said


def test_conversation_commands():
    chat = make(FakeEngine([65, END], [66, END], [67, END]))
    said = session(chat, "/undo", "/regen", "one", "/regen", "/save x", "two", "/undo", "/load", "/load x", "/load y",
                   fine=False)  # fmt: skip
    lines = said.splitlines()
    assert lines[0] == "There is nothing to undo." and lines[1:3] == ["A", "B"]
    assert "Saved in" in lines[3] and lines[4:6] == ["C", "Forgotten: two"]
    assert lines[6].startswith("Saved conversations: x.") and "1 exchange, the last one:" in lines[7]
    assert lines[8:10] == ["User: one", "Assistant: B"] and "there is no" in lines[10]
    assert "temperature 0 the answer would be the same" in session(make(FakeEngine(), temperature=0), "/regen")


@pytest.mark.parametrize("leave", ["quit", "EXIT", "/quit", "/exit"])
def test_leaving_clearing_and_what_is_no_command(leave):
    chat = make(FakeEngine([65, END], [66, END], [67, END], [68, END]))
    lines = [Message("/help", verbatim=True), "clear the table", "quit it", "hello"]
    said = session(chat, *lines, "clear", leave, "never read")
    assert said.startswith("A\nB\nC\nD\n") and said.count("\n") == 5 and chat.turns == []


def test_output_is_undecorated_unless_a_terminal_shows_it():
    for decorated in (False, True):
        chat = make(FakeEngine([65, END], [66] * 99), True, max_tokens=2)
        said = session(chat, "one", "two", decorated=decorated)
        assert ("\033[" in said and "Goodbye" in said and "cut at 2 tokens" in said) == decorated
        if not decorated:
            assert said == "oneA\ntwoBB\n"


def test_a_prompt_too_long_is_an_error_beside_the_output(capsys):
    assert session(make(FakeEngine([65, END])), "word " * 100, "fine", fine=False).strip() == "A"
    assert "64 tokens" in capsys.readouterr().err


# --- the screen -------------------------------------------------------------------------------------------------------


def test_tool_calls_and_control_characters_on_a_terminal():
    answer = [*b"a\x1b[2J\r", *CALL, *b"b\n\tc\x07", END]
    chat, where = make(FakeEngine(answer, answer)), screen(True)
    assert ask(chat, where, "x")
    shown = where.out.getvalue()
    assert re.sub(r"\033\[\d*m", "", shown).replace("\b", "") == "Assistant: ...   a␛[2J␍<6*7=42> b\n\tc␇\n"
    assert "\033[36m<6*7" in shown and "\033[2J" not in shown
    where = screen(False)
    assert ask(chat, where, "x") and where.out.getvalue() == "a\x1b[2J\r<6*7=42>b\n\tc\x07\n"


def test_a_call_without_a_result_is_closed():
    call = CALL[: CALL.index(TOKENIZER.encode_special("<|output_start|>"))]
    chat, where = make(FakeEngine([*call, 65, END])), screen()
    ask(chat, where, "x")
    assert where.out.getvalue() == "<6*7>A\n"
    chat, where = make(FakeEngine(CALL[:2], [65, END]), max_tokens=2), screen(True)
    ask(chat, where, "x")
    ask(chat, where, "y")
    assert re.sub(r"\033\[\d*m", "", where.out.getvalue()).count("<6>") == 1


def test_no_color(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    where = screen(True)
    assert ask(make(FakeEngine([*CALL, 65, END])), where, "x")
    assert "\033" not in where.out.getvalue() and "<6*7=42> A" in where.out.getvalue()


# --- the keyboard -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines,text,verbatim",
    [
        (["one"], "one", False),
        (["  /help "], "/help", False),
        (["one\\", "two\\", "three"], "one\ntwo\nthree", False),
        (["one\\", ""], "one", False),
        (['"""', "/quit", "  two", '"""'], "/quit\n  two", True),
        (['"""one', 'two"""'], "one\ntwo", True),
        (['"""one"""'], "one", True),
        (['""" one " two', "\\", 'three """  '], ' one " two\n\\\nthree ', True),
        (['""""""'], "", True),
        (['"""one', "two"], "one\ntwo", True),  # the end of the input ends a message
        (["one\\"], "one", False),
        (['"""'], "", True),
    ],
)
def test_messages_of_several_lines(lines, text, verbatim):
    remaining, asked = iter(lines), []

    def read_line(continuing):
        asked.append(continuing)
        for line in remaining:
            return line
        raise EOFError

    assert read_message(read_line) == Message(text, verbatim)
    assert asked[: len(lines)] == ["", *["..."] * (len(lines) - 1)]
    with pytest.raises(EOFError):
        read_message(read_line)


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(engine):
    chat, where, written = make(engine, max_tokens=100, temperature=1.0), screen(), []

    def write(text):
        written.append(text)
        if len(written) == 2:
            signal.raise_signal(signal.SIGINT)

    where.out.write = write
    before = signal.getsignal(signal.SIGINT)
    assert ask(chat, where, "hello")
    assert chat.last.reason in ("cancelled", "end") and signal.getsignal(signal.SIGINT) is before
    assert len(chat.turns) == 1 and engine.live == 0
    assert ask(chat, screen(), "again") and len(chat.turns) == 2


def test_ctrl_c_twice_during_an_answer_leaves():
    chat = make(FakeEngine([65] * 50))
    step, steps = chat.engine.step, []

    def interrupted():
        steps.append(1)
        if len(steps) > 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step()

    chat.engine.step = interrupted
    assert "Goodbye" in session(chat, "hello", "never read", decorated=True)
    assert chat.engine.request.finished == "cancelled" and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_typing_warns_first():
    chat = make(FakeEngine([65, END]))
    said = session(chat, KeyboardInterrupt, "hello", KeyboardInterrupt, KeyboardInterrupt, "never", decorated=True)
    assert said.count("Ctrl-C") == 2 and "Goodbye" in said and len(chat.turns) == 1
    assert session(make(FakeEngine()), KeyboardInterrupt, "never") == ""


class Terminal:
    """A person at a pseudo terminal, talking to a scripted model in another process."""

    def __init__(self, base_dir):
        master, slave = pty.openpty()
        root = Path(__file__).parents[2]
        environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "PYTHONPATH": str(root), "TERM": "dumb"}
        command = [sys.executable, "-m", "tests.fakes"]
        self.process = children.start(command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=root,
                                        start_new_session=True)  # fmt: skip
        os.close(slave)
        self.master, self.seen = master, ""

    def expect(self, text, timeout=120.0):
        """What came until `text`, which is consumed."""
        deadline = time.monotonic() + timeout
        while text not in self.seen:
            ready = select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0]
            try:
                data = os.read(self.master, 4096) if ready else b""
            except OSError:  # the other side is gone
                data = b""
            assert data, f"never saw {text!r}; saw {self.seen!r}"
            self.seen += data.decode()
        before, self.seen = self.seen.split(text, 1)
        return before

    def type(self, text):
        os.write(self.master, text.encode())


def test_a_person_at_a_terminal(base_dir):
    one = Terminal(base_dir)
    assert "Try:" in one.expect("User: ")
    one.type("hello\\\n")
    one.expect("... ")
    one.type("there\n")
    one.expect("Echo 12")  # "hello\nthere" and what follows the question: the model counted its characters
    one.expect("User: ")
    one.type("long\n")
    one.expect("na ")
    one.process.send_signal(signal.SIGINT)
    one.expect("[stopped]")
    one.expect("User: ")
    one.type("/und\t\n")
    one.expect("Forgotten: long")
    one.expect("User: ")
    one.type("half a li")
    one.expect("half a li")
    time.sleep(0.3)  # readline waits again
    one.process.send_signal(signal.SIGINT)
    one.expect("Ctrl-C again")
    one.expect("User: ")
    one.type("/quit\n")
    one.expect("Goodbye!")
    assert one.process.wait(60) == 0
    history = base_dir / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert history.read_text().splitlines()[-5:] == ["hello\\", "there", "long", "/undo", "/quit"]
    two = Terminal(base_dir)
    assert "Try:" not in two.expect("User: "), "only the first time"
    two.type("\x10\x10\n")  # twice up in the history
    two.expect("nothing to undo")
    two.expect("User: ")
    time.sleep(0.3)  # until readline waits, the terminal itself would take Ctrl-D
    two.type("\x04")
    two.expect("Goodbye!")
    assert two.process.wait(60) == 0


def test_history_stays_short(base_dir, monkeypatch):
    monkeypatch.setattr(console, "HISTORY_LINES", 10)
    path = base_dir / "chat_history"
    path.write_text("".join(f"line {i}\n" for i in range(50)))
    with console.line_editing() as first:
        assert not first
    assert path.read_text().splitlines() == [f"line {i}" for i in range(40, 50)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
