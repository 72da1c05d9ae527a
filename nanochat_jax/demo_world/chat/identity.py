"""Who the assistant is. The phrasings of one side are not met on the other.

Only for a model of the demo, which knows no more English than the demo world has: three answers, and few ways to ask.
What a real run is finetuned on, with a maker, a license and what it cannot do, is in `tasks/identity.py`.
"""

from __future__ import annotations

from functools import cache
from string import ascii_lowercase

from nanochat_jax.demo_world.chat.talk import PHRASES, Conversation, conversation
from nanochat_jax.demo_world.draw import Draw, side
from nanochat_jax.demo_world.spelling import mistyped, places_of_typos
from nanochat_jax.demo_world.world import World

NAME = "nanochat"

TYPO_SHARE = 0.1
_STYLE = PHRASES["identity_style"]


@cache
def _phrasings(split: str) -> tuple[tuple[str, str], ...]:
    """(question, answer) of one side; the first question of every answer is for training, so both sides have some."""
    out = []
    for asked in PHRASES["identity"]:
        for i, question in enumerate(asked["questions"]):
            where = "train" if i == 0 else side("identity", question)
            if where == split:
                out.append((question, asked["answer"]))
    return tuple(out)


def _with_typo(text: str, draw: Draw) -> str:
    """`text` with a typo in one of its words."""
    place, typo = draw.pick(places_of_typos(text)), draw.below(4)
    return mistyped(text, place, typo, draw.pick(ascii_lowercase) if typo == 3 else "")


def asked_for(draw: Draw) -> tuple[str, str]:
    """A question about the assistant and its answer with {name} in it."""
    question, answer = draw.pick(_phrasings(draw.split))
    mark = "." if question.lower().startswith(_STYLE["statements"]) else "?"
    if draw.chance(TYPO_SHARE):
        question = _with_typo(question, draw)
    style = draw.below(10)
    if style < 6:
        question = question[:1].upper() + question[1:] + mark
    elif style < 8:
        question = draw.pick(_STYLE["before"]) + question + mark
    elif style < 9:
        question = question.lower() + mark
    else:
        question = question.lower()
    return question, answer


def identity(world: World, draw: Draw, name: str = NAME) -> Conversation:
    """Somebody asks the assistant who it is. The conversation also carries `name`."""
    question, answer = asked_for(draw)
    return conversation(question, answer.format(name=name), name=name)
