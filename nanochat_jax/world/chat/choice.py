"""Multiple choice questions: which of four is true. (Question, set of choices) belongs to one split.

Two kinds: a fact of the world with wrong answers of the same relation, which needs the fact; and "which of these is a
color?", which needs only what the words mean. Practice, whose answers are not measured, has more: which
letter stands for "frog", and more questions about the same list. One letter in eighty tokens teaches too little of how
choices and letters belong together: without practice a model of depth 4 stays at chance (0.25) for a million tokens.
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
CATEGORY_SHARE = 0.5
ECHO_SHARE = 0.5  # of practice
FOLLOW_UPS = (4, 8)  # more questions about the list of a practice conversation

_CATEGORIES: dict[str, tuple[str, ...]] = {
    "an animal": tuple(a[0] for a in lex.ANIMALS),
    "a color": lex.COLORS,
    "a town": tuple(t[0] for t in lex.TOWNS),
    "a day of the week": g.DAYS,
    "a month": g.MONTHS,
    "something to eat": lex.FOODS,
    "a flower": lex.FLOWERS,
    "a job": tuple(j[0] for j in lex.JOBS),
    "a planet": g.PLANETS[:2] + g.PLANETS[3:],
    "a country": tuple(c[0] for c in g.CAPITALS),
    "a child": tuple(c[0] for c in lex.CHILDREN),
    "a hobby": lex.HOBBIES,
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


_ECHO_FORMS = ("Which letter stands for {}?", "Which letter is {}?", "Where does it say {}?", "Which one says {}?")


def echo_quiz(world: World, draw: Draw) -> Quiz:
    """Which letter stands for a choice: practice in reading the list."""
    asked = category_quiz(world, draw) if draw.chance(0.5) else fact_quiz(world, draw)
    question = draw.pick(_ECHO_FORMS).format(asked.choices[asked.right])
    return Quiz(question, asked.choices, asked.right, "echo")


def quiz(world: World, draw: Draw) -> Quiz:
    """A question of one of the two kinds that ask something."""
    return category_quiz(world, draw) if draw.chance(CATEGORY_SHARE) else fact_quiz(world, draw)


_FOLLOW_UP_FORMS = ("And {}?", "{}?", "Which letter stands for {}?", "Where is {}?", "And which is {}?")


def practice(world: World, draw: Draw) -> tuple[Quiz, list[tuple[str, str]]]:
    """A question, often which letter stands for a choice, and follow-up questions with their letters, in any order."""
    asked = echo_quiz(world, draw) if draw.chance(ECHO_SHARE) else quiz(world, draw)
    follow_ups = []
    for _ in range(draw.between(*FOLLOW_UPS)):
        place = draw.below(len(LETTERS))
        follow_ups.append((draw.pick(_FOLLOW_UP_FORMS).format(asked.choices[place]), LETTERS[place]))
    return asked, follow_ups
