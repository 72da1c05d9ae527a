"""The terminal chat: streamed text, conversations as the model was trained on them, commands, errors."""

import io
import signal
import threading
from typing import Any

import numpy as np
import pytest

from nanochat_jax import chat as chatting
from nanochat_jax import gpt
from nanochat_jax.chat import Chat, ChatSettings
from nanochat_jax.engine import Engine
from nanochat_jax.reference import params_from_reference
from nanochat_jax.request import Request
from tests.tokenizer_fixtures import GOLDEN, golden_tokenizer


@pytest.fixture(scope="module")
def engine():
    with np.load(GOLDEN / "tokmodel_v1.npz") as arrays:
        sizes: dict[str, Any] = {k.split("/")[1]: int(arrays[k]) for k in arrays if k.startswith("config/")}
        config = gpt.GPTConfig(**sizes)
        names = [k for k in arrays if k.startswith("param/")]
        params = params_from_reference(config, {k.removeprefix("param/"): arrays[k] for k in names})
    return Engine(config, params, golden_tokenizer(), slots=1, capacity=128, steps_per_call=4)


def make(engine, completing, **settings) -> Any:
    return Chat(engine, golden_tokenizer(), ChatSettings(**settings), completing, io.StringIO())


class Scripted:
    """Stands in for an engine: answers with given tokens, a few per step, and remembers what it was asked."""

    capacity = 64

    def __init__(self, *answers):
        self.answers, self.prompts = list(answers), []

    def submit(self, prompt, max_tokens, temperature, top_k, seed):
        self.prompts.append(prompt)
        request = Request(prompt, max_tokens, temperature, top_k, seed, 0, False, 0)
        self.left = list(self.answers.pop(0))[:max_tokens]
        self.request, self.ended = request, len(self.left) < max_tokens
        return request

    def step(self):
        part, self.left = self.left[:2], self.left[2:]
        self.request.tokens += part
        if not self.left:
            self.request.finished = "end" if self.ended else "length"
        return [type("Event", (), {"tokens": part})]

    def cancel(self, request):
        if request.finished is None:
            request.finished = "cancelled"


def test_completion_streams_what_the_engine_generates(engine):
    tokenizer = golden_tokenizer()
    chat = make(engine, True, temperature=0.9, max_tokens=50, seed=5)
    text = chat.answer("Rain on the roof.")
    ids = [tokenizer.bos_id, *tokenizer.encode_text("Rain on the roof.")]
    (result,), _ = engine.generate_batch(ids, max_tokens=50, temperature=0.9, top_k=50, seed=5)
    assert text == chat.out.getvalue()
    shown = [t for t in result[len(ids) :] if t not in chat.shown]
    if len(shown) == len(result) - len(ids):  # no special token was drawn, which would be shown in its own way
        assert text == tokenizer.decode(shown)
    assert chat.answer("Rain on the roof.") == text, "the same seed and prompt give the same answer"


def test_text_is_never_broken_inside_a_character():
    tokenizer = golden_tokenizer()
    text = "naïve 🚀 日本語 ok"
    ids = list(text.encode())  # one token per byte
    chat: Any = Chat(Scripted([*ids, 515]), tokenizer, ChatSettings(), False, io.StringIO())
    pieces = []
    chat.out.write = pieces.append  # type: ignore[method-assign]
    assert chat.answer("hi") == text == "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_conversation_is_rendered_as_in_training():
    tokenizer = golden_tokenizer()
    call = [tokenizer.encode_special("<|python_start|>"), *tokenizer.encode_text("6*7")]
    call += [tokenizer.encode_special("<|python_end|>"), tokenizer.encode_special("<|output_start|>")]
    call += [*tokenizer.encode_text("42"), tokenizer.encode_special("<|output_end|>"), *tokenizer.encode_text(" yes")]
    scripted = Scripted([*call, 515], tokenizer.encode_text("two")[:1], [515])
    chat: Any = Chat(scripted, tokenizer, ChatSettings(max_tokens=30), False, io.StringIO())
    assert chat.answer("one") == "<6*7=42> yes"
    assert chat.reason == "end"
    chat.settings = ChatSettings(max_tokens=1)
    chat.answer("two")
    assert chat.reason == "length"
    chat.settings = ChatSettings(max_tokens=8)
    chat.answer("three")
    parts = [("python", "6*7"), ("python_output", "42"), ("text", " yes")]
    parts = [{"type": kind, "text": text} for kind, text in parts]
    history = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": tokenizer.decode(tokenizer.encode_text("two")[:1])},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": ""},
    ]  # fmt: skip
    assert scripted.prompts[2] == tokenizer.render_for_completion({"messages": history})
    assert scripted.prompts[0] == tokenizer.render_for_completion({"messages": history[:2]})
    chat.clear()
    scripted.answers.append([515])
    chat.answer("three")
    assert scripted.prompts[3] == tokenizer.render_for_completion({"messages": history[4:]})


def test_long_conversations_drop_their_oldest_exchanges():
    tokenizer = golden_tokenizer()
    scripted = Scripted(*([[65, 66, 67, 515]] * 12))
    chat: Any = Chat(scripted, tokenizer, ChatSettings(max_tokens=16), False, io.StringIO())
    for i in range(12):
        chat.answer(f"{i}")
    assert all(len(p) + 16 <= 64 for p in scripted.prompts)
    assert scripted.prompts[-1][0] == tokenizer.bos_id
    assert tokenizer.decode(scripted.prompts[-1]).count("<|user_start|>") == len(chat.turns) > 3
    with pytest.raises(ValueError, match="tokens, but this model reads 64"):
        chat.answer("word " * 100)


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(engine):
    chat = make(engine, False, max_tokens=100, temperature=1.0)
    written = []

    def write(text):
        written.append(text)
        if len(written) == 2:
            signal.raise_signal(signal.SIGINT)

    chat.out.write = write  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGINT)
    assert chatting.ask(chat, "hello", decorated=False)
    assert chat.reason in ("cancelled", "end") and signal.getsignal(signal.SIGINT) is before
    assert len(chat.turns) == 1 and engine.live == 0
    chat.out = io.StringIO()
    assert chatting.ask(chat, "again", decorated=False) and len(chat.turns) == 2


def session(chat, *lines, decorated=False):
    remaining = iter(lines)

    def read():
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    chatting.converse(chat, read, decorated)
    return chat.out.getvalue()


def test_commands_change_the_settings():
    chat: Any = Chat(Scripted(), golden_tokenizer(), ChatSettings(), True, io.StringIO())
    said = session(
        chat,
        "",
        "/temperature 0.25",
        "/topk 7",
        "/maxtokens 12",
        "/seed -3",
        "/nonsense",
        "/topk x",
        "/temperature -1",
        "/help",
    )
    s = chat.settings
    assert (s.temperature, s.top_k, s.max_tokens, s.seed) == (0.25, 7, 12, -3)
    assert "no command /nonsense" in said and "/topk needs a number" in said and "at least 0, got -1" in said
    assert "now 0.25" in said and "/quit" in said


@pytest.mark.parametrize("leave", ["quit", "EXIT", "/quit"])
def test_leaving_and_clearing(leave):
    chat: Any = Chat(Scripted([65, 515]), golden_tokenizer(), ChatSettings(), False, io.StringIO())
    said = session(chat, "hello", "clear", leave, "never read")
    assert said == "A\nConversation cleared.\n" and chat.turns == []


def test_output_is_undecorated_unless_a_terminal_shows_it():
    for decorated in (False, True):
        chat: Any = Chat(
            Scripted([65, 515], [66] * 99), golden_tokenizer(), ChatSettings(max_tokens=2), True, io.StringIO()
        )
        said = session(chat, "one", "two", decorated=decorated)
        assert ("\033[" in said and "Goodbye" in said) == decorated
        if not decorated:
            assert said == "oneA\ntwoBB\n"


def test_an_interrupt_while_typing_leaves():
    chat: Any = Chat(Scripted(), golden_tokenizer(), ChatSettings(), True, io.StringIO())

    def read():
        raise KeyboardInterrupt

    chatting.converse(chat, read, True)
    assert "Goodbye" in chat.out.getvalue()


def test_answers_in_another_thread(engine):
    chat = make(engine, True, max_tokens=5)
    thread = threading.Thread(target=lambda: chatting.ask(chat, "x", decorated=False))
    thread.start()
    thread.join()
    assert chat.out.getvalue().startswith("x")


def test_no_model_says_how_to_train_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert chatting.main(["-p", "hello"]) == 1
    error = capsys.readouterr().err
    assert "scripts.train" in error and "speedrun_jax.sh" in error and "Traceback" not in error
    assert chatting.main(["--run", "missing"]) == 1
    assert "missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--temperature=-1"], "temperature"),
        (["--top_k=-1"], "top_k"),
        (["--max_tokens=0"], "max_tokens"),
        (["--run=a", "--model_tag=b"], "two names"),
    ],
)
def test_bad_settings(argv, message, capsys):
    assert chatting.main(argv) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit):
        chatting.main(["--temprature=1"])
    assert "--temperature" in capsys.readouterr().err
