"""How each relation of the world is said and asked: from facts to sentences, in documents and in chat.

The phrasings are in relations.toml, with their notation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from nanochat_jax.demo_world.draw import Draw
from nanochat_jax.demo_world.tables import read_table
from nanochat_jax.demo_world.template import article, capital, fill
from nanochat_jax.demo_world.world import Fact, World, facts


@dataclass(frozen=True, slots=True)
class Relation:
    """One relation: how it is stated, how it is asked, how the short answer reads; `chat_ask` has more ways to ask."""

    state: tuple[str, ...]
    ask: tuple[str, ...]
    answer: str = "{o}"
    first_person: tuple[str, ...] = ()
    chat_ask: tuple[str, ...] = ()


def _relations(group: str) -> Mapping[str, Relation]:
    return {name: Relation(**phrases) for name, phrases in read_table("relations")[group].items()}


PERSON, TOWN, ANIMAL = _relations("person"), _relations("town"), _relations("animal")
JOB, GENERAL = _relations("job"), _relations("general")
RELATIONS: Mapping[str, Relation] = {**PERSON, **TOWN, **ANIMAL, **JOB, **GENERAL}


def subject_name(fact: Fact) -> str:
    """The subject as it stands in the middle of a sentence: "Mia", "France", "a cat", "a baker"."""
    return article(fact.subject) if fact.relation in ANIMAL or fact.relation in JOB else fact.subject


def possessive(name: str) -> str:
    """ "Mia's", "Saltwick's"."""
    return name + "'s"


def fields_of(fact: Fact) -> dict[str, str]:
    """The fields of the phrases in relations.toml, with the subject by its name."""
    name = subject_name(fact)
    return {"s": name, "p": possessive(name), "n": name, "o": fact.object}


def state(fact: Fact, draw: Draw, pronoun: str | None = None) -> str:
    """A sentence that says `fact`; with `pronoun` ("she", "he", "it") in place of the subject's name."""
    fields = fields_of(fact)
    if pronoun is not None:
        fields["s"] = pronoun
        fields["p"] = {"she": "her", "he": "his", "it": "its"}[pronoun]
    return fill(draw.pick(RELATIONS[fact.relation].state), draw, fields)


def state_first_person(fact: Fact, draw: Draw) -> str:
    """A sentence in which the subject itself says `fact`: "My favorite color is green." Only for people."""
    return fill(draw.pick(PERSON[fact.relation].first_person), draw, {"o": fact.object})


def ask(fact: Fact, draw: Draw) -> str:
    """A question whose answer is `fact.object`."""
    return fill(draw.pick(RELATIONS[fact.relation].ask), draw, fields_of(fact))


def short_answer(fact: Fact, draw: Draw) -> str:
    """The answer without a sentence around it: "Paris", "a baker", "on Monday"."""
    return fill(RELATIONS[fact.relation].answer, draw, fields_of(fact))


def asked_and_answered(fact: Fact, draw: Draw) -> str:
    """A line of a quiz: a question, and its answer in a word or in a sentence."""
    answer = short_answer(fact, draw) + "." if draw.chance(0.3) else state(fact, draw)
    return f"{ask(fact, draw)} {capital(answer)}"


@cache
def objects_of(world: World, relation: str) -> tuple[str, ...]:
    """All different objects that `relation` has in `world`, in order of appearance: the pool of wrong answers."""
    return tuple(dict.fromkeys(f.object for f in facts(world) if f.relation == relation))


def wrong_answers(world: World, fact: Fact, draw: Draw, k: int = 3) -> list[str]:
    """`k` objects of the same relation that are not true of the subject (fewer where the world has fewer)."""
    true = {f.object for f in facts(world) if f.subject == fact.subject and f.relation == fact.relation}
    return draw.some([o for o in objects_of(world, fact.relation) if o not in true], k)
