"""The kinds of conversations, and how to get the one with a given number."""

from __future__ import annotations

from collections.abc import Callable

from nanochat_jax.demo_world.chat.facts import fact_question
from nanochat_jax.demo_world.chat.identity import identity
from nanochat_jax.demo_world.chat.letters import letters, spelling
from nanochat_jax.demo_world.chat.problems import practice_problem, word_problem
from nanochat_jax.demo_world.chat.small import farewell, greeting, small_talk
from nanochat_jax.demo_world.chat.sums import arithmetic
from nanochat_jax.demo_world.chat.tales import story_request
from nanochat_jax.demo_world.chat.talk import Conversation
from nanochat_jax.demo_world.draw import Draw, stable_hash
from nanochat_jax.demo_world.world import World

Maker = Callable[[World, Draw], Conversation]

_TURNS: tuple[Maker, ...] = (identity, fact_question, fact_question, arithmetic, spelling, letters, small_talk)


def several_turns(world: World, draw: Draw) -> Conversation:
    """Two or three exchanges of different kinds, sometimes between a greeting and a goodbye."""
    parts = [make(world, draw) for make in draw.some(_TURNS, draw.between(1, 2))]
    if len(parts) == 1 or draw.chance(0.3):
        if draw.chance(0.5):
            parts.insert(0, greeting(draw))
        else:
            parts.append(farewell(draw))
    return {"messages": [message for part in parts for message in part["messages"]]}


KINDS: dict[str, Maker] = {
    "arithmetic": arithmetic,
    "word-problems": word_problem,
    "practice-problems": practice_problem,
    "spelling": spelling,
    "letters": letters,
    "facts": fact_question,
    "identity": identity,
    "stories": story_request,
    "small-talk": small_talk,
    "turns": several_turns,
}


def draw_for(kind: str, index: int, split: str, seed: int) -> Draw:
    """The chance of conversation number `index` of a kind. Raises ValueError as `Draw` does."""
    return Draw(stable_hash(f"chat/{kind}/{seed}"), split, index)
