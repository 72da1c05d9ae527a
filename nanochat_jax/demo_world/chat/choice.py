"""Multiple choice questions: which of four is true. (Question, set of choices) belongs to one split.

Two kinds: which of four words is an animal, which needs only what the words mean, and a fact of the world with wrong
answers of the same relation, which needs the fact. Finding the letter of a choice is hard for a small model, because
what the question asks must be matched with what stands before each letter. Where the question is always the same there
is nothing to match: that is learned from some 700 letters at depth 4, if they come alone. With questions for colors,
days and months beside those for animals it is lost again, so the other words are wrong answers only.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_jax.demo_world import lexicon as lex
from nanochat_jax.demo_world.chat.facts import asked_facts, question
from nanochat_jax.demo_world.chat.talk import PHRASES
from nanochat_jax.demo_world.draw import Draw, side
from nanochat_jax.demo_world.relations import RELATIONS, wrong_answers
from nanochat_jax.demo_world.world import World

LETTERS = ("A", "B", "C", "D")
ANIMAL_SHARE = 0.7  # the rest are facts

_ANIMALS = tuple(a.kind for a in lex.ANIMALS)
_OTHERS: tuple[tuple[str, ...], ...] = (lex.COLORS, lex.DAYS, lex.MONTHS)


@dataclass(frozen=True, slots=True)
class Quiz:
    """A question with four choices, the number of the right one, and its kind: "animal" or the fact's relation."""

    question: str
    choices: tuple[str, ...]
    right: int
    kind: str


def _arranged(asked: str, right: str, wrong: list[str], kind: str, draw: Draw) -> Quiz:
    place = draw.below(len(LETTERS))
    choices = [*wrong[:place], right, *wrong[place:]]
    return Quiz(asked, tuple(choices), place, kind)


def animal_quiz(draw: Draw) -> Quiz:
    """Which of four words is an animal; the others are a color, a day and a month."""
    while True:
        right = draw.pick(_ANIMALS)
        wrong = [draw.pick(words) for words in draw.some(_OTHERS, len(LETTERS) - 1)]
        if side("choice", right, *sorted(wrong)) == draw.split:
            return _arranged(draw.pick(PHRASES["choice"]["animal"]), right, wrong, "animal", draw)


def fact_quiz(world: World, draw: Draw) -> Quiz:
    """A fact, asked as the documents ask it, with three wrong answers that would be true of another subject."""
    while True:
        fact = draw.pick(asked_facts(world))
        wrong = wrong_answers(world, fact, draw, len(LETTERS) - 1)
        if len(wrong) == len(LETTERS) - 1 and side("choice", fact.subject, fact.relation, *sorted(wrong)) == draw.split:
            asked = question(fact, draw.pick(RELATIONS[fact.relation].ask), draw)
            return _arranged(asked, fact.object, wrong, fact.relation, draw)


def quiz(world: World, draw: Draw) -> Quiz:
    """A question of one of the two kinds."""
    return animal_quiz(draw) if draw.chance(ANIMAL_SHARE) else fact_quiz(world, draw)
