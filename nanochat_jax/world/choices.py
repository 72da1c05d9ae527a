"""Pages of multiple choice questions with their answers, in the layout of the chat stages: so it is no news there."""

from __future__ import annotations

from nanochat_jax.world.chance import Draw
from nanochat_jax.world.chat.choice import LETTERS, quiz
from nanochat_jax.world.world import World
from tasks.common import render_mc


def page(world: World, draw: Draw) -> str:
    """Three to six questions, the right letter below each."""
    asked = [quiz(world, draw) for _ in range(draw.between(3, 6))]
    return "\n\n".join(f"{render_mc(q.question, LETTERS, q.choices)}\n{LETTERS[q.right]}" for q in asked)
