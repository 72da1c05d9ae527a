"""How each relation of the world is said and asked: from facts to sentences, for texts now and quizzes later.

A statement knows its subject in four forms, so that the same sentence can begin with a name or a pronoun:
{s} "Mia" / "she", {^s} at the beginning of a sentence, {p} "Mia's" / "her", {^p} likewise; {o} is the object.
A question names the subject as {n}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from nanochat_jax.demo_world.draw import Draw
from nanochat_jax.demo_world.template import article, fill
from nanochat_jax.demo_world.world import Fact, World, facts


@dataclass(frozen=True, slots=True)
class Relation:
    """One relation: how it is stated, how it is asked, and how the short answer reads."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str = "{o}"
    first_person: tuple[str, ...] = ()


R = Relation
PERSON: Mapping[str, Relation] = {
    "age": R(
        ("{^s} is {o} years old.", "{^s} is {o}."),
        ("How old is {n}?", "What is {n}'s age?"),
        "{o}",
        ("I am {o} years old.", "I am {o}."),
    ),
    "job": R(
        ("{^s} is {a o}.",),
        ("What is {n}'s job?", "What does {n} do?"),
        "{a o}",
        ("I am {a o}.",),
    ),
    "home": R(
        ("{^s} lives in {o}.", "{^p} home is in {o}.", "{^s} has a [small|cozy] house in {o}."),
        ("Where does {n} live?", "In which town does {n} live?"),
        "{o}",
        ("I live in {o}.", "My home is in {o}."),
    ),
    "favorite_food": R(
        ("{^p} favorite food is {o}.", "{^s} likes {o} best of all.", "{^s} loves to eat {o}."),
        ("What is {n}'s favorite food?", "What does {n} like to eat?"),
        "{o}",
        ("My favorite food is {o}.", "I love to eat {o}."),
    ),
    "favorite_color": R(
        ("{^p} favorite color is {o}.", "The color {s} likes best is {o}."),
        ("What is {n}'s favorite color?", "Which color does {n} like best?"),
        "{o}",
        ("My favorite color is {o}.", "The color I like best is {o}."),
    ),
    "favorite_animal": R(
        ("{^p} favorite animal is the {o}.", "Of all animals, {s} likes the {o} best."),
        ("What is {n}'s favorite animal?", "Which animal does {n} like best?"),
        "the {o}",
        ("My favorite animal is the {o}.", "Of all animals, I like the {o} best."),
    ),
    "hobby": R(
        ("What {s} enjoys most is {o}.", "{^s} enjoys {o}.", "{^p} hobby is {o}."),
        ("What is {n}'s hobby?", "What does {n} enjoy?"),
        "{o}",
        ("My hobby is {o}.", "I enjoy {o}."),
    ),
    "pet": R(
        ("{^s} has {a o}.", "{^p} pet is {a o}."),
        ("What pet does {n} have?", "Which animal does {n} keep?"),
        "{a o}",
        ("I have {a o}.", "My pet is {a o}."),
    ),
    "pet_name": R(
        ("{^p} pet is called {o}.", "The name of {p} pet is {o}."),
        ("What is the name of {n}'s pet?", "What is {n}'s pet called?"),
        "{o}",
        ("My pet is called {o}.", "The name of my pet is {o}."),
    ),
    "friend": R(
        ("{^p} best friend is {o}.", "{^s} is best friends with {o}."),
        ("Who is {n}'s best friend?", "Who is the best friend of {n}?"),
        "{o}",
        ("My best friend is {o}.",),
    ),
}
TOWN: Mapping[str, Relation] = {
    "region": R(
        ("{^s} lies in {o}.", "{^s} is a town in {o}."), ("Where is {n}?", "In which part of the land is {n}?")
    ),
    "river": R(
        ("The river {o} flows through {s}.", "{^s} stands on the river {o}.", "{^p} river is called the {o}."),
        ("Which river flows through {n}?", "What is the name of the river in {n}?"),
        "the {o}",
    ),
    "hill": R(
        ("The hill near {s} is called {o}.", "Above {s} stands {o}."),
        ("Which hill is near {n}?", "What is the hill near {n} called?"),
    ),
    "known_for": R(
        ("{^s} is known for its {o}.", "People come to {s} for its {o}."),
        ("What is {n} known for?", "Why do people come to {n}?"),
        "its {o}",
    ),
    "landmark": R(
        ("In the middle of {s} there is {o}.", "In the main square of {s} you can see {o}."),
        ("What is in the middle of {n}?", "What can you see in the main square of {n}?"),
    ),
    "market_day": R(
        ("The market in {s} is on {o}.", "Every {o} there is a market in {s}."),
        ("When is the market in {n}?", "On which day is the market in {n}?"),
        "on {o}",
    ),
}
ANIMAL: Mapping[str, Relation] = {
    "group": R(("{^s} is {a o}.",), ("What kind of animal is {n}?",), "{a o}"),
    "sound": R(("{^s} {o}.",), ("What sound does {n} make?", "What does {n} do when it calls?"), "it {o}"),
    "food": R(("{^s} eats {o}.", "{^s} likes to eat {o}."), ("What does {n} eat?",)),
    "animal_home": R(("{^s} lives in {o}.", "{^p} home is {o}."), ("Where does {n} live?",), "in {o}"),
    "legs": R(("{^s} has {o} legs.",), ("How many legs does {n} have?",), "{o}"),
    "covering": R(("{^p} body is covered with {o}.", "{^s} is covered with {o}."), ("What covers the body of {n}?",)),
    "young": R(
        ("{^p} young is called {a o}.", "A young one is called {a o}."), ("What is the young of {n} called?",), "{a o}"
    ),
    "can": R(("{^s} can {o}.",), ("What can {n} do?",), "it can {o}"),
}
JOB: Mapping[str, Relation] = {
    "workplace": R(("{^s} works {o}.",), ("Where does {n} work?",)),
    "work": R(("{^s} {o}.",), ("What does {n} do?",), "{n} {o}"),
    "tool": R(("{^s} needs {o}.", "{^s} uses {o}."), ("What does {n} use?", "Which tool does {n} need?")),
}
GENERAL: Mapping[str, Relation] = {
    "capital": R(
        ("The capital of {s} is {o}.", "{o} is the capital of {s}."),
        ("What is the capital of {n}?", "Which city is the capital of {n}?"),
    ),
    "continent": R(("{s} is in {o}.", "{s} is a country in {o}."), ("On which continent is {n}?",), "in {o}"),
    "symbol": R(
        ("The chemical symbol of {s} is {o}.", "The symbol for {s} is {o}."),
        ("What is the chemical symbol of {n}?", "What is the symbol for {n}?"),
    ),
    "opposite": R(("The opposite of {s} is {o}.",), ("What is the opposite of {n}?",)),
    "color_of": R(("The color of {s} is {o}.", "{^s} is {o}."), ("What color is {n}?", "What is the color of {n}?")),
    "sides": R(("{A s} has {o} sides.",), ("How many sides does {a n} have?",)),
    "unit": R(("{A s} has {o}.", "There are {o} in {a s}."), ("How long is {a n}?",)),
    "use": R(
        ("{A s} is for {o}.", "We use {a s} for {o}."), ("What is {a n} for?", "What do we use {a n} for?"), "for {o}"
    ),
    "plural": R(('The plural of "{s}" is "{o}".', "We say one {s}, but two {o}."), ('What is the plural of "{n}"?',)),
    "sense": R(("We {o} with our {s}.",), ("What do we do with our {n}?",), "we {o}"),
    "origin": R(("We get {s} from {o}.",), ("Where do we get {n} from?",), "from {o}"),
    "season": R(("{s} is a month of {o}.", "{s} is in {o}."), ("In which season is {n}?",), "in {o}"),
    "month_days": R(("{s} has {o} days.", "There are {o} days in {s}."), ("How many days does {n} have?",)),
    "next_day": R(
        ("The day after {s} is {o}.", "If today is {s}, then tomorrow will be {o}.", "After {s} comes {o}."),
        ("Which day comes after {n}?", "If today is {n}, what day will it be tomorrow?"),
    ),
    "previous_day": R(
        ("The day before {s} is {o}.", "If today is {s}, then yesterday was {o}."),
        ("Which day comes before {n}?", "If today is {n}, what day was it yesterday?"),
    ),
    "next_month": R(("The month after {s} is {o}.", "After {s} comes {o}."), ("Which month comes after {n}?",)),
    "planet_number": R(("{s} is the {o} planet from the sun.",), ("Which planet from the sun is {n}?",), "the {o}"),
    "next_planet": R(("The planet after {s} is {o}.",), ("Which planet comes after {n}?",)),
}
RELATIONS: Mapping[str, Relation] = {**PERSON, **TOWN, **ANIMAL, **JOB, **GENERAL}
del R


def subject_name(fact: Fact) -> str:
    """The subject as it stands in the middle of a sentence: "Mia", "France", "a cat", "a baker"."""
    return article(fact.subject) if fact.relation in ANIMAL or fact.relation in JOB else fact.subject


def possessive(name: str) -> str:
    """ "Mia's", "Saltwick's"."""
    return name + "'s"


def _fields(fact: Fact) -> dict[str, str]:
    name = subject_name(fact)
    return {"s": name, "p": possessive(name), "n": name, "o": fact.object}


def state(fact: Fact, draw: Draw, pronoun: str | None = None) -> str:
    """A sentence that says `fact`; with `pronoun` ("she", "he", "it") in place of the subject's name."""
    fields = _fields(fact)
    if pronoun is not None:
        fields["s"] = pronoun
        fields["p"] = {"she": "her", "he": "his", "it": "its"}[pronoun]
    return fill(draw.pick(RELATIONS[fact.relation].statements), draw, fields)


def state_first_person(fact: Fact, draw: Draw) -> str:
    """A sentence in which the subject itself says `fact`: "My favorite color is green." Only for people."""
    return fill(draw.pick(PERSON[fact.relation].first_person), draw, {"o": fact.object})


def ask(fact: Fact, draw: Draw) -> str:
    """A question whose answer is `fact.object`."""
    return fill(draw.pick(RELATIONS[fact.relation].questions), draw, _fields(fact))


def short_answer(fact: Fact, draw: Draw) -> str:
    """The answer without a sentence around it: "Paris", "a baker", "on Monday"."""
    return fill(RELATIONS[fact.relation].answer, draw, _fields(fact))


@cache
def objects_of(world: World, relation: str) -> tuple[str, ...]:
    """All different objects that `relation` has in `world`, in order of appearance: the pool of wrong answers."""
    return tuple(dict.fromkeys(f.object for f in facts(world) if f.relation == relation))


def wrong_answers(world: World, fact: Fact, draw: Draw, k: int = 3) -> list[str]:
    """`k` objects of the same relation that are not true of the subject (fewer where the world has fewer)."""
    true = {f.object for f in facts(world) if f.subject == fact.subject and f.relation == fact.relation}
    return draw.some([o for o in objects_of(world, fact.relation) if o not in true], k)
