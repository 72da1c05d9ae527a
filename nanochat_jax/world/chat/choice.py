"""Multiple choice questions: which of four is true. (Question, set of choices) belongs to one split.

Two kinds: a fact of the world with wrong answers of the same relation, which needs the fact; and "which of these is a
color?", which needs only what the words mean. Finding the letter that belongs to a choice is hard for a small model: at
depth 4, and with these four categories, accuracy leaves chance after some 8,000 letters and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_jax.world import general as g
from nanochat_jax.world import lexicon as lex
from nanochat_jax.world.chance import Draw, side
from nanochat_jax.world.chat.facts import asked_facts, question
from nanochat_jax.world.relations import RELATIONS, wrong_answers
from nanochat_jax.world.world import World

LETTERS = ("A", "B", "C", "D")
CATEGORY_SHARE = 0.75

_CATEGORIES: dict[str, tuple[str, ...]] = {
    "an animal": tuple(a[0] for a in lex.ANIMALS),
    "a color": lex.COLORS,
    "a day of the week": g.DAYS,
    "a month": g.MONTHS,
}
_CATEGORY_FORMS = ("Which of these is {}?", "Which one is {}?", "What is {}?")


@dataclass(frozen=True, slots=True)
class Quiz:
    """A question with four choices, the number of the right one, and its kind: "category" or the fact's relation."""

    question: str
    choices: tuple[str, ...]
    right: int
    kind: str


def _arranged(asked: str, right: str, wrong: list[str], kind: str, draw: Draw) -> Quiz:
    place = draw.below(len(LETTERS))
    choices = [*wrong[:place], right, *wrong[place:]]
    return Quiz(asked, tuple(choices), place, kind)


def category_quiz(world: World, draw: Draw) -> Quiz:
    """Which of four words is an animal, a color, ..."""
    names = list(_CATEGORIES)
    while True:
        mine, *others = draw.some(names, len(LETTERS))
        right = draw.pick(_CATEGORIES[mine])
        wrong = [draw.pick(_CATEGORIES[other]) for other in others]
        if side("choice", mine, right, *sorted(wrong)) == draw.split:
            return _arranged(draw.pick(_CATEGORY_FORMS).format(mine), right, wrong, "category", draw)


def fact_quiz(world: World, draw: Draw) -> Quiz:
    """A fact, asked as the documents ask it, with three wrong answers that would be true of another subject."""
    while True:
        fact = draw.pick(asked_facts(world))
        wrong = wrong_answers(world, fact, draw, len(LETTERS) - 1)
        if len(wrong) == len(LETTERS) - 1 and side("choice", fact.subject, fact.relation, *sorted(wrong)) == draw.split:
            return _arranged(
                question(fact, draw.pick(RELATIONS[fact.relation].questions), draw),
                fact.object,
                wrong,
                fact.relation,
                draw,
            )


def quiz(world: World, draw: Draw) -> Quiz:
    """A question of one of the two kinds that ask something."""
    return category_quiz(world, draw) if draw.chance(CATEGORY_SHARE) else fact_quiz(world, draw)
