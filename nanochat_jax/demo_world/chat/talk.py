"""The pieces of a conversation: questions, answers, and calls of the calculator with their true result."""

from __future__ import annotations

from typing import Any

from nanochat_jax.demo_world.draw import Draw
from nanochat_jax.demo_world.tables import read_table
from nanochat_jax.text.calculator import use_calculator

Conversation = dict[str, Any]
Parts = list[dict[str, str]]

PHRASES = read_table("chat", "nanochat_jax.demo_world.chat")
OPENING_SHARE = 0.1


def said(text: str) -> Parts:
    """The part for `text`."""
    return [{"type": "text", "text": text}]


def calculated(expression: str) -> Parts:
    """The parts of a tool call: the expression and what the calculator says. ValueError where it refuses."""
    value = use_calculator(expression)
    if value is None:
        raise ValueError(f"the calculator does not accept {expression!r}")
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": str(value)}]


def conversation(question: str, answer: str | Parts, **more: Any) -> Conversation:
    """One question and its answer; `more` is stored beside the messages, for evaluation."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def opened(question: str, draw: Draw) -> str:
    """`question`, now and then behind a greeting or another opening."""
    return draw.pick(PHRASES["openings"]) + question if draw.chance(OPENING_SHARE) else question
