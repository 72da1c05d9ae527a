"""The terminal chat: streamed text, conversations as the model was trained on them, commands, the keyboard, errors."""

import io
import json
import os
import pty
import re
import select
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.terminal import app, console
from nanochat_jax.terminal.console import Message, Screen, ask, converse, read_message
from nanochat_jax.terminal.session import Chat, ChatSettings
from nanochat_jax.text.detokenizer import as_text
from nanochat_jax.text.prompts import ContextOverflow
from nanochat_jax.utils.errors import InputError
from tests import children
from tests.fakes import FakeEngine
from tests.serve_fixtures import toy_engine
from tests.tokenizer_fixtures import golden_tokenizer

TOKENIZER = golden_tokenizer()
END = TOKENIZER.encode_special("<|assistant_end|>")


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def engine():
    return toy_engine(slots=1)


def make(engine, completing=False, **settings) -> Any:
    return Chat(engine, TOKENIZER, ChatSettings(**settings), completing)


def screen(decorated=False) -> Any:
    return Screen(io.StringIO(), decorated)


def say(chat, text) -> str:
    """The answer as shown, checked against what was streamed."""
    pieces = []
    chat.answer(text, pieces.extend)
    assert chat.completing or not pieces or as_text(chat.turns[-1].pieces) == as_text(pieces)
    return as_text(pieces)


# the tokens of <6*7=42>
CALL = [
    TOKENIZER.encode_special("<|python_start|>"),
    *TOKENIZER.encode_text("6*7"),
    TOKENIZER.encode_special("<|python_end|>"),
    TOKENIZER.encode_special("<|output_start|>"),
    *TOKENIZER.encode_text("42"),
    TOKENIZER.encode_special("<|output_end|>"),
]


# --- the conversation -------------------------------------------------------------------------------------------------


def test_completion_is_what_the_engine_generates(engine):
    chat = make(engine, True, temperature=0.9, max_tokens=50, seed=5)
    text = say(chat, "Rain on the roof.")
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode_text("Rain on the roof.")]
    (completion,) = engine.generate([ids], SamplingParams(50, temperature=0.9, top_k=50, seed=5))
    shown = [t for t in completion.tokens if t not in TOKENIZER.special_tokens.values()]
    if len(shown) == len(completion.tokens):  # else a special token was drawn, which is shown in its own way
        assert text == TOKENIZER.decode(shown)
    assert say(chat, "Rain on the roof.") == text, "the same seed and prompt give the same answer"


def test_conversation_is_rendered_as_in_training():
    scripted = FakeEngine([*CALL, *TOKENIZER.encode_text(" yes"), END], TOKENIZER.encode_text("two")[:1], [END])
    chat = make(scripted, max_tokens=30)
    assert say(chat, "one") == "<6*7=42> yes"
    assert chat.last.reason == "end"
    chat.settings = ChatSettings(max_tokens=1)
    say(chat, "two")
    assert chat.last.reason == "length"
    chat.settings = ChatSettings(max_tokens=8)
    say(chat, "three")
    parts = [("python", "6*7"), ("python_output", "42"), ("text", " yes")]
    history = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": TOKENIZER.decode(TOKENIZER.encode_text("two")[:1])},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": ""},
    ]  # fmt: skip
    assert scripted.prompts[2] == TOKENIZER.render_for_completion({"messages": history})
    assert scripted.prompts[0] == TOKENIZER.render_for_completion({"messages": history[:2]})
    chat.clear()
    scripted.answers.append([END])
    say(chat, "three")
    assert scripted.prompts[3] == TOKENIZER.render_for_completion({"messages": history[4:]})


def test_earlier_answers_are_found_in_the_engines_cache(engine):
    chat = make(engine, max_tokens=10)
    requests, submit = [], engine.submit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engine, "submit", lambda *args, **kwargs: requests.append(submit(*args, **kwargs)) or requests[-1]
        )
        say(chat, "hello")
        say(chat, "and now?")
    first, second = requests
    assert second.reused >= len(first.prompt) + len(first.tokens) - 2


def test_long_conversations_drop_their_oldest_exchanges():
    scripted = FakeEngine(*([[65, 66, 67, END]] * 12))
    chat, dropped = make(scripted, max_tokens=16), 0
    for i in range(12):
        say(chat, f"{i}")
        dropped += chat.last.dropped
    assert all(len(p) + 16 <= 64 for p in scripted.prompts)
    assert scripted.prompts[-1][0] == TOKENIZER.bos_id
    assert TOKENIZER.decode(scripted.prompts[-1]).count("<|user_start|>") == len(chat.turns) == 12 - dropped > 3
    for completing in (False, True):
        with pytest.raises(ContextOverflow, match="64 tokens"):
            say(make(scripted, completing), "word " * 100)


def test_regenerate_replaces_the_answer_with_another_seeds():
    scripted = FakeEngine([65, END], [66, END], [67, END], [68, END], [])
    chat = make(scripted, seed=7)
    with pytest.raises(InputError):
        chat.regenerate(lambda _: None)
    say(chat, "a")
    say(chat, "b")
    chat.regenerate(lambda _: None)
    chat.regenerate(lambda _: None)
    assert [as_text(t.pieces) for t in chat.turns] == ["A", "D"]
    assert [r.params.seed for r in scripted.requests] == [7, 7, 8, 9]
    assert scripted.prompts[1] == scripted.prompts[2] == scripted.prompts[3]
    chat.engine.submit = lambda *a, **k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        chat.regenerate(lambda _: None)
    assert [as_text(t.pieces) for t in chat.turns] == ["A", "D"], "a failure costs nothing"


def test_undo_and_an_answer_stopped_before_its_first_word():
    chat = make(FakeEngine([65, END], [66, END], [67, END], [68, END]))
    assert chat.undo() is None
    say(chat, "a")
    say(chat, "b")
    assert chat.undo() == "b" and [t.question for t in chat.turns] == ["a"]
    say(chat, "c")
    assert TOKENIZER.decode(chat.engine.prompts[2]).count("<|user_start|>") == 2
    chat.stopping.set()
    chat.engine.step = lambda: []
    say(chat, "hello")
    assert chat.last.reason == "cancelled" and len(chat.turns) == 2 and chat.asked == "hello"


# --- keeping conversations --------------------------------------------------------------------------------------------


def test_save_and_load_keep_every_token(base_dir):
    chat = make(FakeEngine([*CALL, *TOKENIZER.encode_text(" yes"), END], [65, END], [66, END]))
    say(chat, "naïve 🚀")
    say(chat, "x\ny")
    path = chat.save("one")
    assert path == base_dir / "chats" / "one.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert json.loads(path.read_text())["messages"][1] == {"role": "assistant", "content": "<6*7=42> yes"}
    other = make(FakeEngine([66, END]))
    other.load("one")
    assert [(t.question, t.pieces, t.tokens) for t in other.turns] == [
        (t.question, t.pieces, t.tokens) for t in chat.turns
    ]
    say(other, "go on")
    say(chat, "go on")
    assert other.engine.prompts[-1] == chat.engine.prompts[-1]
    other.save("one")  # its own file may be written again
    with pytest.raises(InputError, match="one.json"):
        make_with_turn().save("one")


def make_with_turn() -> Any:
    chat = make(FakeEngine([65, END], [66, END]))
    say(chat, "hello")
    return chat


def test_load_takes_a_system_message_and_part_lists(base_dir):
    file = base_dir / "other.json"
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1?"}]
    messages += [{"role": "assistant", "content": parts}]
    file.write_text(json.dumps(messages))
    chat = make_with_turn()
    chat.load(str(file))
    assert chat.turns[0].question == "Be kind.\n\n1+1?" and as_text(chat.turns[0].pieces) == "<1+1=2>"
    say(chat, "more")
    expected = TOKENIZER.render_for_completion(
        {"messages": [*messages, {"role": "user", "content": "more"}, {"role": "assistant", "content": ""}]}
    )
    assert chat.engine.prompts[-1] == expected


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"3",
        b"{}",
        b"[]",
        b'[{"role": "user", "content": "x"}]',
        b'[{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]',
        b'[{"role": "user", "content": "x"}, {"role": "assistant", "content": 3}]',
        b"\xff\xfe\x00",
    ],
)
def test_bad_and_missing_files_are_named_and_cost_nothing(base_dir, content):
    file = base_dir / "bad.json"
    file.write_bytes(content)
    chat = make_with_turn()
    chat.save("monday")
    with pytest.raises(InputError, match="bad.json"):
        chat.load(str(file))
    with pytest.raises(InputError, match="monday"):  # which names there are
        chat.load("tuesday")
    with pytest.raises(InputError):
        chat.save(" ")
    with pytest.raises(InputError):
        make(FakeEngine()).save("x")  # nothing to save
    assert len(chat.turns) == 1


# --- commands ---------------------------------------------------------------------------------------------------------


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


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv,flag",
    [
        (["--temperature=-1"], "temperature"),
        (["--top_k=-1"], "top_k"),
        (["--top_p=1.5"], "top_p"),
        (["--max_tokens=0"], "max_tokens"),
        (["--run=a", "--model_tag=b"], "--model_tag"),
        (["-p", " "], "prompt"),
    ],
)
def test_bad_settings(argv, flag, capsys):
    with pytest.raises(SystemExit) as stop:
        app.main(argv)
    assert stop.value.code == 2 and flag in capsys.readouterr().err


def test_a_prompt_from_standard_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("zwei\nZeilen ü\n".encode()), encoding="utf-8"))
    seen = []
    monkeypatch.setattr(app, "_run", lambda settings: seen.append(settings.prompt) or 0)
    assert app.main(["-p", "-"]) == 0 and seen == ["zwei\nZeilen ü"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8"))
    with pytest.raises(SystemExit) as stop:
        app.main(["-p", "-"])
    assert stop.value.code == 2 and "prompt is empty" in capsys.readouterr().err


@pytest.fixture
def chosen(engine, monkeypatch):
    """A model is loaded, and answers; the returned list is what `checkpoint.chosen` says of it."""
    meta, words = {"run": "r", "stage": "sft", "step": 7}, ["r, stage sft, step 7, saved today", ""]
    monkeypatch.setattr("nanochat_jax.runs.checkpoint.load_model", lambda *a: (engine.config, None, TOKENIZER, meta))
    monkeypatch.setattr(
        "nanochat_jax.inference.engine.Engine", lambda *a, **k: FakeEngine([*TOKENIZER.encode_text("hi"), END])
    )
    monkeypatch.setattr("nanochat_jax.runs.checkpoint.chosen", lambda *a: words)
    return words


def test_one_answer_says_whose_it_is_only_where_that_is_a_question(chosen, capsys):
    assert app.main(["-p", "hello", "--device=cpu"]) == 0
    assert capsys.readouterr() == ("hi\n", "")
    chosen[1] = "the newest of 3 runs"
    assert app.main(["-p", "hello", "--device=cpu"]) == 0
    assert capsys.readouterr() == ("hi\n", "(r, stage sft, step 7, saved today, the newest of 3 runs)\n")


class Input(io.TextIOWrapper):
    typed = False

    def isatty(self):
        return self.typed


def piped(monkeypatch, data: bytes, answers: int, *argv: str) -> tuple[int, list[str]]:
    """(exit status, the questions that the model was asked) of a chat whose standard input holds `data`."""
    engine = FakeEngine(*([[65 + n % 26, END] for n in range(answers)]))
    engine.capacity = 1000
    monkeypatch.setattr("nanochat_jax.inference.engine.Engine", lambda *a, **k: engine)
    monkeypatch.setattr(sys, "stdin", Input(io.BytesIO(data), encoding="utf-8"))
    status = app.main([*argv, "--device=cpu"])
    asked = [TOKENIZER.decode(p).split("<|user_start|>")[-1].split("<|user_end|>")[0] for p in engine.prompts]
    return status, asked


# what a file or a pipe holds -> the prompts
PIPED = [
    ("Hello\n", ["Hello"]),
    ("Hello", ["Hello"]),
    ("/home/ann/x is empty. Why?\n", ["/home/ann/x is empty. Why?"]),
    ("quit\nexit\nclear\n/quit\n/help\n/regen\n/\n", ["quit", "exit", "clear", "/quit", "/help", "/regen", "/"]),
    ('"""\none\\\ntwo\\', ['"""', "one\\", "two\\"]),
    ("  def f(x):  \n\treturn 1\n", ["  def f(x):  ", "\treturn 1"]),
    ("one\n\n \n\t\ntwo\n", ["one", "two"]),
    ("one\r\ntwo\r\n", ["one", "two"]),
    ("\ufeffone\ntwo", ["one", "two"]),
    ("a\u2028b\x0cc\x1fd\n", ["a\u2028b\x0cc\x1fd"]),
    ("--depth=3\n-p x\n", ["--depth=3", "-p x"]),
    ("", []),
    ("\n\n", []),
]


@pytest.mark.parametrize("data,prompts", PIPED)
def test_a_pipe_holds_prompts_only(chosen, data, prompts, monkeypatch, capsys):
    assert piped(monkeypatch, data.encode(), len(prompts)) == (0, prompts)
    assert capsys.readouterr().out == "".join(f"{chr(65 + n)}\n" for n in range(len(prompts)))


def test_bytes_that_are_no_text_are_replaced(chosen, monkeypatch, capsys):
    assert piped(monkeypatch, b"a\xffb\n\x00c", 2) == (0, ["a\ufffdb", "\x00c"])
    assert piped(monkeypatch, b"\xef\xbb\xbfa\xff\n", 1, "-p", "-") == (0, ["a\ufffd"])
    assert piped(monkeypatch, b"", 1, "-p", b"na\xc3\xafve \xff".decode("ascii", "surrogateescape"))[1] == [
        "naïve \ufffd"
    ]


def test_a_person_whose_answers_go_to_a_file_still_has_commands(chosen, monkeypatch, capsys):
    monkeypatch.setattr(Input, "typed", True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert piped(monkeypatch, b" one \n/temperature\nquit\ntwo\n", 1) == (0, ["one"])


@pytest.mark.parametrize(
    "closed,argv,status",
    [
        ("stdin", [], 1),
        ("stdin", ["-p", "-"], 1),
        ("stdout", ["-p", "x"], 1),
        ("stdout", [], 1),
        ("stdin", ["-p", "x"], 0),
    ],
)
def test_a_closed_stream_is_one_line(chosen, closed, argv, status, monkeypatch, capsys):
    for name in ("stdin", "stdout"):  # what is put in their place is taken away again
        monkeypatch.setattr(sys, name, getattr(sys, name))
    setattr(sys, closed, None)
    assert app.main([*argv, "--device=cpu"]) == status
    err = capsys.readouterr().err
    assert (err.startswith("error: standard ") and err.count("\n") == 1) if status else not err


def test_an_input_that_cannot_be_read_is_one_line(chosen, monkeypatch, capsys):
    class Unreadable(io.StringIO):
        def read(self, *_):
            raise IsADirectoryError(21, "Is a directory")

        readline = read

    monkeypatch.setattr(sys, "stdin", Unreadable())
    for argv in ([], ["-p", "-"]):
        assert app.main([*argv, "--device=cpu"]) == 1
        assert capsys.readouterr().err == "error: standard input cannot be read: Is a directory\n"


def at_a_terminal(monkeypatch):
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)


@pytest.mark.parametrize("others", ["", "the newest of 3 runs"])
def test_a_conversation_begins_with_what_is_talked_to(chosen, others, monkeypatch, capsys):
    def nothing(prompt):
        raise EOFError

    chosen[1] = others
    at_a_terminal(monkeypatch)
    monkeypatch.setattr("builtins.input", nothing)
    assert app.main(["--device=cpu"]) == 0
    shown = capsys.readouterr()
    headline, *more = shown.out.rpartition("\r")[2].splitlines()
    assert headline.startswith("r, stage sft, step 7, saved today: ") and "64 tokens" in headline
    assert (f"({others})" in more) == bool(others) and shown.err == ""


def test_no_model_says_how_to_train_one_on_a_line_of_its_own(monkeypatch, capsys):
    at_a_terminal(monkeypatch)
    assert app.main(["--device=cpu"]) == 1
    shown = capsys.readouterr()
    assert shown.out.endswith("\n") and shown.err.startswith("error: ") and "speedrun_jax.sh" in shown.err
