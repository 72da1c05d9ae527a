"""A chat of the terminal without a terminal."""

import io
from typing import Any

from nanochat_jax.terminal.console import Screen
from nanochat_jax.terminal.session import Chat, ChatSettings
from nanochat_jax.text.detokenizer import as_text
from tests.tokenizer_fixtures import golden_tokenizer

TOKENIZER = golden_tokenizer()
END = TOKENIZER.encode_special("<|assistant_end|>")


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
