"""The command line of the terminal chat: flags, pipes, closed streams."""

import io
import sys

import pytest

from nanochat_jax.terminal import app
from tests.chat_fixtures import END, TOKENIZER
from tests.fakes import FakeEngine


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
