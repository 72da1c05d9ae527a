"""The conversation of the terminal chat: as the model was trained on it, and kept in files."""

import json
import stat
from typing import Any

import pytest

from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.terminal.session import ChatSettings
from nanochat_jax.text.detokenizer import as_text
from nanochat_jax.text.prompts import ContextOverflow
from nanochat_jax.utils.errors import InputError
from tests.chat_fixtures import CALL, END, TOKENIZER, make, say
from tests.fakes import FakeEngine


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
