"""Questions about the world's facts, each relation asked in several ways and answered in one.

The answer is a sentence as the documents have it, so that the model need not learn the fact a second time. A (fact,
phrasing) pair belongs to one split: what is held out is a fact that training asks for in other words. Phrasings of the
documents, and one phrasing of every fact, are for training only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, lru_cache

from nanochat_jax.demo_world.chat.talk import Conversation, conversation, opened
from nanochat_jax.demo_world.draw import TRAIN, Draw, side, stable_hash
from nanochat_jax.demo_world.relations import RELATIONS, objects_of, subject_name
from nanochat_jax.demo_world.template import capital, fill
from nanochat_jax.demo_world.world import Fact, World, facts

# More ways to ask than relations.py has: {n} is the subject, {a n} the subject behind its article.
_MORE_QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "age": ("What age is {n}?", "Tell me {n}'s age.", "How many years old is {n}?", "Do you know how old {n} is?"),
    "job": (
        "What work does {n} do?", "Which job does {n} have?", "Tell me {n}'s job.", "What is the job of {n}?",
        "Do you know what {n}'s job is?",
    ),
    "home": (
        "What town does {n} live in?", "Where is {n}'s home?", "Which town is the home of {n}?",
        "Tell me where {n} lives.", "Do you know where {n} lives?", "In what town is {n} at home?",
    ),
    "favorite_food": (
        "What food does {n} like best?", "Which food does {n} love?", "What is the favorite food of {n}?",
        "Tell me {n}'s favorite food.", "What does {n} love to eat?", "Do you know {n}'s favorite food?",
    ),
    "favorite_color": (
        "What color does {n} like best?", "Which color is {n}'s favorite?", "What is the favorite color of {n}?",
        "Tell me {n}'s favorite color.", "Do you know {n}'s favorite color?", "Which is the favorite color of {n}?",
    ),
    "favorite_animal": (
        "What animal does {n} like best?", "Which animal is {n}'s favorite?", "What is the favorite animal of {n}?",
        "Tell me {n}'s favorite animal.", "Do you know {n}'s favorite animal?",
    ),
    "hobby": (
        "What is the hobby of {n}?", "Which hobby does {n} have?", "Tell me {n}'s hobby.",
        "Do you know {n}'s hobby?", "What does {n} enjoy most?", "What does {n} like to do?",
    ),
    "pet": (
        "Which pet does {n} have?", "What kind of pet does {n} have?", "What animal does {n} have at home?",
        "Tell me which pet {n} has.", "What is {n}'s pet?", "Do you know {n}'s pet?",
    ),
    "pet_name": (
        "What is the name of the pet of {n}?", "How is {n}'s pet called?", "Tell me the name of {n}'s pet.",
        "What name does {n}'s pet have?", "Do you know the name of {n}'s pet?",
    ),
    "friend": (
        "Who is best friends with {n}?", "Tell me {n}'s best friend.", "What is the name of {n}'s best friend?",
        "Who is the friend of {n}?", "Do you know {n}'s best friend?", "Which friend does {n} like best?",
    ),
    "region": ("In which region is {n}?", "Tell me where {n} lies.", "In what region does {n} lie?",
               "Where does {n} lie?"),
    "river": (
        "What river flows through {n}?", "Tell me the river of {n}.", "On which river is {n}?",
        "Which river is in {n}?", "What is the river of {n} called?",
    ),
    "hill": (
        "What is the name of the hill near {n}?", "Which hill is by {n}?", "Tell me the hill near {n}.",
        "What hill is near {n}?",
    ),
    "known_for": (
        "For what is {n} known?", "Tell me what {n} is known for.", "What is the town of {n} known for?",
        "What makes {n} known?",
    ),
    "landmark": (
        "What stands in the middle of {n}?", "What is there in the middle of {n}?",
        "Tell me what is in the middle of {n}.", "What is in the main square of {n}?",
    ),
    "market_day": (
        "Which day is market day in {n}?", "On what day is the market in {n}?", "Tell me the market day of {n}.",
        "What day is the market in {n}?",
    ),
    "group": ("What is {n}?", "To which group does {n} belong?", "Tell me what kind of animal {n} is.",
              "Which kind of animal is {n}?"),
    "sound": ("Which sound does {n} make?", "What noise does {n} make?", "Tell me the sound of {n}.",
              "How does {n} sound?"),
    "food": (
        "What is the food of {n}?", "Which food does {n} eat?", "What does {n} like to eat?",
        "Tell me what {n} eats.", "Do you know what {n} eats?",
    ),
    "animal_home": (
        "What is the home of {n}?", "In what does {n} live?", "Tell me where {n} lives.", "Where is the home of {n}?",
        "Do you know where {n} lives?",
    ),
    "legs": ("Tell me how many legs {n} has.", "What number of legs does {n} have?", "Count the legs of {n}.",
             "Do you know how many legs {n} has?"),
    "covering": ("With what is {n} covered?", "What is {n} covered with?", "Tell me what covers {n}.",
                 "What is on the body of {n}?"),
    "young": (
        "What is a young of {n} called?", "How is the young of {n} called?", "Tell me the name of the young of {n}.",
        "What do we call the young of {n}?",
    ),
    "workplace": ("At what place does {n} work?", "Tell me where {n} works.", "Where can you find {n} at work?",
                  "Do you know where {n} works?"),
    "capital": (
        "Tell me the capital of {n}.", "What city is the capital of {n}?", "Name the capital of {n}.",
        "What is {n}'s capital?", "Do you know the capital of {n}?",
    ),
    "symbol": ("Tell me the symbol of {n}.", "Which symbol does {n} have?", "What symbol stands for {n}?",
               "Name the chemical symbol of {n}."),
    "opposite": (
        "Tell me the opposite of {n}.", "Which word is the opposite of {n}?", "Name the opposite of {n}.",
        "What word means the opposite of {n}?", "Do you know the opposite of {n}?",
    ),
    "color_of": ("Which color is {n}?", "Tell me the color of {n}.", "Which color has {n}?", "What color has {n}?",
                 "Do you know the color of {n}?"),
    "sides": ("Tell me how many sides {a n} has.", "What number of sides does {a n} have?",
              "Count the sides of {a n}.", "Do you know how many sides {a n} has?"),
    "origin": ("Tell me where {n} comes from.", "Where does {n} come from?", "What do we get {n} from?",
               "From what do we get {n}?"),
    "season": ("Which season is {n} in?", "Tell me the season of {n}.", "To which season does {n} belong?",
               "What season is it in {n}?"),
    "next_day": (
        "What day comes after {n}?", "Which day follows {n}?", "Tell me the day after {n}.",
        "What is the day after {n}?", "Which day is after {n}?",
    ),
    "previous_day": (
        "What day comes before {n}?", "Tell me the day before {n}.", "What is the day before {n}?",
        "Which day is before {n}?",
    ),
    "next_month": (
        "What month comes after {n}?", "Which month follows {n}?", "Tell me the month after {n}.",
        "What is the month after {n}?", "Which month is after {n}?",
    ),
}  # fmt: skip
# Where the documents' first way to say a fact is not the best answer.
_ANSWERS = {"age": "{^s} is {o} years old.", "sound": "{^s} {o}.", "group": "{^s} is {a o}."}
_GROWN_UP_RELATIONS = ("job",)  # of grown-ups only the job is asked: they are in few documents


@lru_cache(maxsize=8)
def asked_facts(world: World) -> tuple[Fact, ...]:
    """The facts that chat asks for: of children everything but the job, of grown-ups the job, and of the rest the
    relations that have questions here."""
    children, adults = {p.name for p in world.children}, {p.name for p in world.adults}
    out = []
    for fact in facts(world):
        if fact.relation not in _MORE_QUESTIONS:
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
    more = _MORE_QUESTIONS[fact.relation]
    always = more[stable_hash(str(fact)) % len(more)]
    mine = tuple(
        form
        for form in more
        if (TRAIN if form == always else side("asked", fact.subject, fact.relation, form)) == split
    )
    return (RELATIONS[fact.relation].questions + mine) if split == TRAIN else mine


@lru_cache(maxsize=16)
def _askable(world: World, split: str) -> tuple[Fact, ...]:
    return tuple(fact for fact in asked_facts(world) if phrasings(fact, split))


def question(fact: Fact, form: str, draw: Draw) -> str:
    """The question for `fact` in the phrasing `form`."""
    return fill(form, draw, {"n": subject_name(fact)})


def answer_sentence(fact: Fact, draw: Draw) -> str:
    """The one sentence with which chat answers: "Mia lives in Willowby." """
    name = subject_name(fact)
    form = _ANSWERS.get(fact.relation, RELATIONS[fact.relation].statements[0])
    return capital(fill(form, draw, {"s": name, "p": name + "'s", "n": name, "o": fact.object}))


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
