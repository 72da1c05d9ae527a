"""Texts about people: portraits, introductions, comparisons, conversations, letters, diary pages."""

from __future__ import annotations

from functools import cache

from nanochat_jax.demo_world.draw import Draw, side
from nanochat_jax.demo_world.lexicon import DAYS, FRUITS, PLACES, THINGS
from nanochat_jax.demo_world.relations import PERSON, asked_and_answered, state, state_first_person
from nanochat_jax.demo_world.tables import read_table
from nanochat_jax.demo_world.template import capital, fill
from nanochat_jax.demo_world.world import Person, World, fact_of, lookup

_RELATIONS = tuple(PERSON)
_PHRASES = read_table("documents")


@cache
def person_fields(world: World, name: str, tag: str = "") -> dict[str, str]:
    """The fields of one person for templates; with `tag` "2" they are called hero2, he2, ..."""
    p = world.person(name)
    town = world.town(p.home)
    out = {
        "hero": p.name, "he": p.pronoun, "He": capital(p.pronoun), "him": p.him, "his": p.his, "His": capital(p.his),
        "self": "herself" if p.pronoun == "she" else "himself", "job": p.job, "town": p.home, "region": town.region,
        "river": town.river, "hill": town.hill, "known": town.known_for, "food": p.food,
        "mark": "the " + town.landmark.split(" ", 1)[1],
        "color": p.color, "beast": p.animal, "hobby": p.hobby, "kind": p.pet_kind, "pet": p.pet_name,
        "market": town.market_day,
    }  # fmt: skip
    return {key + tag: value for key, value in out.items()}


@cache
def pair_fields(world: World, name: str) -> dict[str, str]:
    """The fields of a person and, with tag 2, of that person's best friend."""
    return person_fields(world, name) | person_fields(world, world.person(name).friend, "2")


def _chosen(world: World, draw: Draw, kind: str, low: int, high: int) -> tuple[Person, list[str]]:
    """A person and some relations in an order that belongs to this split."""
    while True:
        person = draw.pick(world.people)
        relations = draw.some(_RELATIONS, draw.between(low, high))
        if "pet_name" in relations:  # the name of a pet makes sense only behind the pet
            relations.remove("pet_name")
            if "pet" not in relations:
                relations.append("pet")
            relations.insert(relations.index("pet") + 1, "pet_name")
        if side(kind, person.name, *relations) == draw.split:
            return person, relations


def portrait(world: World, draw: Draw) -> str:
    """One paragraph about one person, in the third person."""
    person, relations = _chosen(world, draw, "portrait", 4, 8)
    out = []
    named = True
    for relation in relations:
        out.append(state(fact_of(world, person.name, relation), draw, None if named else person.pronoun))
        named = relation == "friend" or draw.chance(0.12)  # behind a friend's name "she" would be the friend
        if relation == "job" and not person.is_child and draw.chance(0.7):
            job = world.job(person.job)
            fields = {"He": capital(person.pronoun), "work": job.work, "workplace": job.workplace}
            out.append(fill(draw.pick(_PHRASES["portrait"]["job"]), draw, fields))
        elif relation == "home" and draw.chance(0.4):
            out.append(state(fact_of(world, person.home, draw.pick(("region", "river", "known_for"))), draw))
        elif relation == "friend" and draw.chance(0.5):
            other = draw.pick(("favorite_color", "favorite_food", "hobby", "age", "pet"))
            out.append(state(fact_of(world, person.friend, other), draw))
    return " ".join(out)


def introduction(world: World, draw: Draw) -> str:
    """A person introduces herself or himself."""
    person, relations = _chosen(world, draw, "introduction", 4, 8)
    phrases = _PHRASES["introduction"]
    out = [f"{draw.pick(phrases['hello'])} My name is {person.name}."]
    for relation in relations:
        out.append(state_first_person(fact_of(world, person.name, relation), draw))
        if relation == "friend" and draw.chance(0.5):
            out.append(f"We like to spend the {draw.pick(phrases['friend'])} together.")
    out.append(draw.pick(phrases["end"]))
    return " ".join(out).strip()


def comparison(world: World, draw: Draw) -> str:
    """Two people side by side."""
    while True:
        a, b = draw.some(world.people, 2)
        relations = draw.some(
            ("age", "job", "home", "favorite_food", "favorite_color", "favorite_animal", "hobby", "pet"), 4
        )
        if side("comparison", a.name, b.name, *relations) == draw.split:
            break
    phrases = _PHRASES["comparison"]
    out = [fill(draw.pick(phrases["begin"]), draw, {"a": a.name, "b": b.name})]
    for relation in relations:
        one, two = lookup(world, a.name, relation), lookup(world, b.name, relation)
        if one == two and relation != "age":
            out.append(fill(phrases["both"][relation], draw, {"one": one}))
        elif relation == "age" and a.age != b.age:
            old, young = (a, b) if a.age > b.age else (b, a)
            ages = [lookup(world, p.name, "age") for p in (old, young)]
            older = f"so {old.name} is older than {young.name}."
            out.append(f"{old.name} is {ages[0]} and {young.name} is {ages[1]}, {older}")
        elif relation == "age":
            out.append(f"{a.name} and {b.name} are both {one} years old.")
        else:
            first = state(fact_of(world, a.name, relation), draw)[:-1]
            second = state(fact_of(world, b.name, relation), draw)
            second = second if second.startswith(b.name) else second[:1].lower() + second[1:]
            out.append(f"{first}, {draw.pick(('but', 'and'))} {second}")
    return " ".join(out)


def conversation(world: World, draw: Draw) -> str:
    """Two people who do not know each other well ask and answer."""
    while True:
        a, b = draw.some(world.people, 2)
        relations = draw.some(
            ("age", "job", "home", "favorite_food", "favorite_color", "favorite_animal", "hobby", "friend"), 3
        )
        if a.friend != b.name and side("conversation", a.name, b.name, *relations) == draw.split:
            break
    place = draw.pick(PLACES)[1]
    phrases = _PHRASES["conversation"]
    out = [f"{a.name} met {b.name} {place}."]
    for i, relation in enumerate(relations):
        answer = state_first_person(fact_of(world, b.name, relation), draw)[:-1]
        question = phrases["questions"][relation]
        lead = "Hello! " if i == 0 else draw.pick(("", "And ", "Tell me, "))
        if lead in ("And ", "Tell me, "):
            question = question[:1].lower() + question[1:]
        back = f'"{answer}," {draw.pick(("said", "answered"))} {b.name}.'
        out.append(f'"{lead}{question}" asked {a.name}. {back}')
        if draw.chance(0.5):
            mine = state_first_person(fact_of(world, a.name, relation), draw)[:-1]
            same = lookup(world, a.name, relation) == lookup(world, b.name, relation)
            out.append(f'"{"It is the same with me. " if same else ""}{mine}," said {a.name}.')
    out.append(draw.pick(phrases["end"]))
    return "\n".join(out)


def letter(world: World, draw: Draw) -> str:
    """A letter from a person to that person's best friend."""
    person, place, thing = draw.combination("letter", world.people, PLACES, THINGS)
    day, day2 = draw.some(DAYS, 2)
    fields = pair_fields(world, person.name) | {"at": place[1], "thing": thing, "day": day, "day2": day2}
    return fill(_PHRASES["pages"]["letter"], draw, fields)


def diary(world: World, draw: Draw) -> str:
    """A page of someone's diary."""
    person, place, thing, day = draw.combination("diary", world.people, PLACES, THINGS, DAYS)
    fields = pair_fields(world, person.name) | {
        "place": place[0], "thing": thing, "day": day, "fruit": draw.pick(FRUITS),
    }  # fmt: skip
    return fill(_PHRASES["pages"]["diary"], draw, fields)


def person_quiz(world: World, draw: Draw) -> str:
    """Questions and answers about one or two people."""
    while True:
        people = draw.some(world.people, draw.pick((1, 2, 2)))
        picks = [(p.name, r) for p in people for r in draw.some(_RELATIONS, 4 if len(people) == 1 else 3)]
        if side("person quiz", *picks) == draw.split:
            break
    return "\n".join(asked_and_answered(fact_of(world, name, relation), draw) for name, relation in picks)
