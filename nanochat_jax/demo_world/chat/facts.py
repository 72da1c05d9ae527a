"""Questions about the world's facts, each relation asked in several ways and answered in one.

The answer is a sentence as the documents have it, so that the model need not learn the fact a second time. A (fact,
phrasing) pair belongs to one split: what is held out is a fact that training asks for in other words. Phrasings of the
documents, and one phrasing of every fact, are for training only.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache

from nanochat_jax.demo_world.chat.talk import Conversation, conversation, opened
from nanochat_jax.demo_world.draw import TRAIN, Draw, side, stable_hash
from nanochat_jax.demo_world.relations import RELATIONS, fields_of, objects_of, subject_name
from nanochat_jax.demo_world.template import capital, fill
from nanochat_jax.demo_world.world import Fact, World, facts

_GROWN_UP_RELATIONS = ("job",)  # of grown-ups only the job is asked: they are in few documents


@lru_cache(maxsize=8)
def asked_facts(world: World) -> tuple[Fact, ...]:
    """The facts that chat asks for: of children everything but the job, of grown-ups the job, and of the rest the
    relations that have questions here."""
    children, adults = {p.name for p in world.children}, {p.name for p in world.adults}
    out = []
    for fact in facts(world):
        if not RELATIONS[fact.relation].chat_ask:
            continue
        if fact.subject in children and fact.relation in _GROWN_UP_RELATIONS:
            continue
        if fact.subject in adults and fact.relation not in _GROWN_UP_RELATIONS:
            continue
        out.append(fact)
    return tuple(out)


@cache
def phrasings(fact: Fact, split: str) -> tuple[str, ...]:
    """The question templates with which `split` may ask for `fact`."""
    relation = RELATIONS[fact.relation]
    more = relation.chat_ask
    always = more[stable_hash(str(fact)) % len(more)]
    mine = tuple(
        form
        for form in more
        if (TRAIN if form == always else side("asked", fact.subject, fact.relation, form)) == split
    )
    return (relation.ask + mine) if split == TRAIN else mine


@lru_cache(maxsize=16)
def _askable(world: World, split: str) -> tuple[Fact, ...]:
    return tuple(fact for fact in asked_facts(world) if phrasings(fact, split))


def question(fact: Fact, form: str, draw: Draw) -> str:
    """The question for `fact` in the phrasing `form`."""
    return fill(form, draw, {"n": subject_name(fact)})


def answer_sentence(fact: Fact, draw: Draw) -> str:
    """The one sentence with which chat answers: "Mia lives in Willowby." """
    return capital(fill(RELATIONS[fact.relation].state[0], draw, fields_of(fact)))


@cache
def _rivals(world: World, relation: str) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((o, re.compile(rf"(?<!\w){re.escape(o)}(?!\w)", re.I)) for o in objects_of(world, relation))


def names_only(world: World, relation: str, answer: str, text: str, sentence: str) -> bool:
    """Whether `text` has `answer` as a whole phrase, in any case, and no other object of the relation.

    Objects that the reference answer `sentence` itself contains ("chick" is no rival in "a chick", nor is the subject
    of the question) do not count as others.
    """
    found = {o for o, pattern in _rivals(world, relation) if pattern.search(text)}
    allowed = {o for o, pattern in _rivals(world, relation) if pattern.search(sentence)}
    return answer in found and found <= allowed


def fact_question(world: World, draw: Draw) -> Conversation:
    """A question about the world. The conversation also carries `relation` and `object`."""
    fact = draw.pick(_askable(world, draw.split))
    form = draw.pick(phrasings(fact, draw.split))
    asked = opened(question(fact, form, draw), draw)
    return conversation(asked, answer_sentence(fact, draw), relation=fact.relation, object=fact.object)
