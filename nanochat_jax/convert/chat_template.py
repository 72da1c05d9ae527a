"""The chat template (Jinja) that renders a conversation as `chat_format.render_conversation` does.

Libraries render to text first and split that into tokens, special tokens included. So what our rendering can say but
text cannot is refused by the template instead of becoming other tokens: special tokens' names inside a message (they
would turn into the tokens themselves: a prompt injection) and two text parts in a row (they would merge).
"""

import json
from pathlib import Path

from nanochat_jax.text import chat_format

_NAMES = (
    "BOS", "USER_START", "USER_END", "ASSISTANT_START", "ASSISTANT_END", "PYTHON_START", "PYTHON_END", "OUTPUT_START",
    "OUTPUT_END",
)  # fmt: skip


def chat_template(special_tokens: list[str]) -> str:
    """The template's text for a tokenizer with these special tokens. Its output includes bos: add none."""
    text = Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8")
    text = text.replace("SPECIAL_TOKENS", json.dumps(special_tokens))
    for name in _NAMES:
        text = text.replace("{{- " + name + " -}}", "{{- '" + getattr(chat_format, name) + "' -}}")
    return text
