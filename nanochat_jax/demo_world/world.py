"""The world itself: who lives where, what the animals eat, and every other fact, as data that can be asked.

Texts are made *from* these facts and never the other way round, so whatever the generator says about Mia on one page
it says on every page, and a test or a quiz can look the answer up. `make_world(0)` is the public world; its facts are
stable. Other seeds give other people and the same nature.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from nanochat_jax.demo_world import lexicon as lex
from nanochat_jax.demo_world.lexicon import Animal, Profession, Town, number_word


@dataclass(frozen=True, slots=True)
class Fact:
    """One statement: the `relation` of `subject` is `object`, for example ("Mia", "home", "Willowby")."""

    subject: str
    relation: str
    object: str

    def __str__(self) -> str:
        return f"{self.subject}/{self.relation}/{self.object}"


@dataclass(frozen=True, slots=True)
class Person:
    """A person. `friend` is a name, and friendship is mutual; friends live in the same town."""

    name: str
    pronoun: str
    age: int
    job: str
    home: str
    food: str
    color: str
    animal: str
    hobby: str
    pet_kind: str
    pet_name: str
    friend: str

    @property
    def is_child(self) -> bool:
        return self.age < 16

    @property
    def him(self) -> str:
        return "her" if self.pronoun == "she" else "him"

    @property
    def his(self) -> str:
        return "her" if self.pronoun == "she" else "his"


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """Everything that exists. Use `make_world`. Compared by identity, so that it is a cheap key of caches."""

    seed: int
    people: tuple[Person, ...]
    towns: tuple[Town, ...]
    animals: tuple[Animal, ...]
    jobs: tuple[Profession, ...]

    @property
    def children(self) -> tuple[Person, ...]:
        return tuple(p for p in self.people if p.is_child)

    @property
    def adults(self) -> tuple[Person, ...]:
        return tuple(p for p in self.people if not p.is_child)

    def person(self, name: str) -> Person:
        """The person called `name`; KeyError where there is none."""
        return _by_name(self)[name]

    def town(self, name: str) -> Town:
        """The town called `name`; KeyError where there is none."""
        return {t.name: t for t in self.towns}[name]

    def job(self, name: str) -> Profession:
        """The job called `name`; KeyError where there is none."""
        return {j.name: j for j in self.jobs}[name]


@lru_cache(maxsize=8)
def _by_name(world: World) -> dict[str, Person]:
    return {p.name: p for p in world.people}


def _deal(rng: random.Random, items: tuple, n: int) -> list:
    """`n` items in random order, each used equally often as far as possible."""
    out: list = []
    while len(out) < n:
        deck = list(items)
        for i in range(len(deck) - 1, 0, -1):
            j = int(rng.random() * (i + 1))
            deck[i], deck[j] = deck[j], deck[i]
        out += deck
    return out[:n]


@lru_cache(maxsize=8)
def make_world(seed: int = 0) -> World:
    """The world of `seed`: the same towns, animals and jobs for all seeds, people dealt out anew for each."""
    rng = random.Random(seed)
    names = lex.CHILDREN + lex.ADULTS
    n = len(names)
    town_names = tuple(t.name for t in lex.TOWNS)  # one home for each pair of friends, grown-ups in every town
    homes = _deal(rng, town_names, len(lex.CHILDREN) // 2) + _deal(rng, town_names, len(lex.ADULTS) // 2)
    jobs = ["student"] * len(lex.CHILDREN) + _deal(rng, tuple(job.name for job in lex.JOBS), len(lex.ADULTS))
    foods, colors = _deal(rng, lex.FOODS, n), _deal(rng, lex.COLORS, n)
    animals, hobbies = _deal(rng, tuple(a.kind for a in lex.ANIMALS), n), _deal(rng, lex.HOBBIES, n)
    kinds, pets = _deal(rng, lex.PET_KINDS, n), _deal(rng, lex.PET_NAMES, n)
    order = _deal(rng, tuple(range(len(lex.CHILDREN))), len(lex.CHILDREN))
    order += [len(lex.CHILDREN) + i for i in _deal(rng, tuple(range(len(lex.ADULTS))), len(lex.ADULTS))]
    place_in_order = {who: place for place, who in enumerate(order)}
    people = []
    for i, (name, pronoun) in enumerate(names):
        child = i < len(lex.CHILDREN)
        place = place_in_order[i]
        people.append(
            Person(
                name=name,
                pronoun=pronoun,
                age=7 + int(rng.random() * 6) if child else 25 + int(rng.random() * 46),
                job=jobs[i],
                home=homes[place // 2],
                food=foods[i],
                color=colors[i],
                animal=animals[i],
                hobby=hobbies[i],
                pet_kind=kinds[i],
                pet_name=pets[i],
                friend=names[order[place ^ 1]][0],
            )
        )
    return World(seed, tuple(people), lex.TOWNS, lex.ANIMALS, lex.JOBS)


@lru_cache(maxsize=8)
def facts(world: World) -> tuple[Fact, ...]:
    """Every fact of `world` that the texts use, in a fixed order. Numbers are written as words."""
    out: list[Fact] = []

    def known(subject: str, **objects: str) -> None:
        out.extend(Fact(subject, relation, value) for relation, value in objects.items())

    for p in world.people:
        known(
            p.name, age=number_word(p.age), job=p.job, home=p.home, favorite_food=p.food, favorite_color=p.color,
            favorite_animal=p.animal, hobby=p.hobby, pet=p.pet_kind, pet_name=p.pet_name, friend=p.friend,
        )  # fmt: skip
    for t in world.towns:
        known(
            t.name, region=t.region, river=t.river, hill=t.hill, known_for=t.known_for, landmark=t.landmark,
            market_day=t.market_day,
        )  # fmt: skip
    for a in world.animals:
        known(
            a.kind, group=a.group, sound=a.sound, food=a.food, animal_home=a.home,
            legs=number_word(a.legs) if a.legs else "no", covering=a.covering, young=a.young, can=a.can,
        )  # fmt: skip
    for j in world.jobs:
        known(j.name, workplace=j.workplace, work=j.work, tool=j.tool)
    pairs: dict[str, list[tuple[str, str]]] = {relation: list(known) for relation, known in lex.GENERAL.items()}
    pairs["opposite"] += [(b, a) for a, b in lex.GENERAL["opposite"]]
    pairs |= {
        "next_day": [(d, lex.DAYS[(i + 1) % 7]) for i, d in enumerate(lex.DAYS)],
        "previous_day": [(d, lex.DAYS[i - 1]) for i, d in enumerate(lex.DAYS)],
        "next_month": [(m, lex.MONTHS[(i + 1) % 12]) for i, m in enumerate(lex.MONTHS)],
        "planet_number": [(p, lex.ORDINALS[i]) for i, p in enumerate(lex.PLANETS)],
        "next_planet": [(p, lex.PLANETS[i + 1]) for i, p in enumerate(lex.PLANETS[:-1])],
    }
    out += [Fact(a, relation, b) for relation, rows in pairs.items() for a, b in rows]
    return tuple(out)


def lookup(world: World, subject: str, relation: str) -> str:
    """The object of a fact; KeyError where the world has no such fact."""
    return _index(world)[subject, relation]


def fact_of(world: World, subject: str, relation: str) -> Fact:
    """The fact that `world` has about `subject` and `relation`; KeyError where there is none."""
    return Fact(subject, relation, lookup(world, subject, relation))


@lru_cache(maxsize=8)
def _index(world: World) -> dict[tuple[str, str], str]:
    return {(f.subject, f.relation): f.object for f in facts(world)}
