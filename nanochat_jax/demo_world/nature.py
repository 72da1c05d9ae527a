"""Texts about animals, towns and jobs."""

from __future__ import annotations

from nanochat_jax.demo_world.draw import Draw, side
from nanochat_jax.demo_world.relations import ANIMAL, JOB, TOWN, asked_and_answered, state
from nanochat_jax.demo_world.tables import read_table
from nanochat_jax.demo_world.template import article, capital, fill, join_words
from nanochat_jax.demo_world.world import World, fact_of

_ANIMAL = tuple(ANIMAL)
_TOWN = tuple(TOWN)
_PHRASES = read_table("documents")


def _chosen(draw: Draw, kind: str, names: list[str], relations: tuple[str, ...], low: int, high: int):
    while True:
        name = draw.pick(names)
        order = draw.some(relations, draw.between(low, high))
        if side(kind, name, *order) == draw.split:
            return name, order


def animal_page(world: World, draw: Draw) -> str:
    """A paragraph about one kind of animal, and perhaps who keeps or likes it."""
    kind, order = _chosen(draw, "animal", [a.kind for a in world.animals], _ANIMAL, 4, 7)
    out = []
    for i, relation in enumerate(order):
        out.append(state(fact_of(world, kind, relation), draw, "it" if i else None))
    keepers = [p for p in world.people if p.pet_kind == kind]
    lovers = [p.name for p in world.people if p.animal == kind]
    if keepers and draw.chance(0.5):
        p = draw.pick(keepers)
        out.append(f"{p.name} has {article(kind)} called {p.pet_name}.")
    elif lovers and draw.chance(0.5):
        out.append(f"It is the favorite animal of {draw.pick(lovers)}.")
    return " ".join(out)


def animal_pair(world: World, draw: Draw) -> str:
    """Two animals compared."""
    while True:
        a, b = draw.some(world.animals, 2)
        order = draw.some(("group", "sound", "food", "animal_home", "legs", "young", "can"), 3)
        if side("animal pair", a.kind, b.kind, *order) == draw.split:
            break
    phrases, out = _PHRASES["animal_pair"], []
    for relation in order:
        one, two = fact_of(world, a.kind, relation), fact_of(world, b.kind, relation)
        if one.object == two.object:
            if not out:
                out.append(fill(phrases["begin"], draw, {"a": a.kind, "b": b.kind}))
            fields = {"one": one.object, "bare": _bare(one.object)}
            out.append(fill(phrases["both"][relation], draw, fields))
        else:
            second = state(two, draw)
            first = state(one, draw)[:-1]
            out.append(f"{first}, {draw.pick(phrases['joints'])} {second[:1].lower()}{second[1:]}")
    return " ".join(out)


def _bare(verb: str) -> str:
    return verb[:-2] if verb.endswith(("ches", "shes", "sses", "zzes")) else verb[:-1]


def animal_list(world: World, draw: Draw) -> str:
    """Which animals share a property: mammals, animals with four legs, animals that eat grass, ..."""
    while True:
        groups = []
        for relation in draw.some(("group", "legs", "food", "covering"), 3):
            value = fact_of(world, draw.pick(world.animals).kind, relation).object
            kinds = [a.kind for a in world.animals if fact_of(world, a.kind, relation).object == value]
            groups.append((relation, value, draw.some(kinds, draw.between(2, 4))))
        if side("animal list", *groups) == draw.split:
            break
    out = []
    for relation, value, kinds in groups:
        names = capital(join_words([article(kind) for kind in kinds]))
        phrase = _PHRASES["animal_list"][relation][len(kinds) > 1]
        out.append(fill(phrase, draw, {"names": names, "value": value}))
    return " ".join(out)


def town_page(world: World, draw: Draw) -> str:
    """A paragraph about one town and the people who live there."""
    name, order = _chosen(draw, "town", [t.name for t in world.towns], _TOWN, 3, 6)
    out = []
    for i, relation in enumerate(order):
        short = i > 0 and relation in ("region", "river") and draw.chance(0.7)  # "the market in it" reads badly
        out.append(state(fact_of(world, name, relation), draw, "it" if short else None))
    people = [p for p in world.people if p.home == name]
    if people:
        names = join_words([p.name for p in people])
        if draw.chance(0.6):
            out.append(f"{names} {'live' if len(people) > 1 else 'lives'} here.")
        p = draw.pick(people)
        if draw.chance(0.5) and not p.is_child:
            out.append(f"{p.name}, who lives in {name}, is {article(p.job)} and {world.job(p.job).work}.")
        elif draw.chance(0.6):
            spot = draw.pick(("the " + world.town(name).landmark.split(" ", 1)[1], "the river"))
            out.append(f"{p.name}'s {p.pet_kind} {p.pet_name} likes to sleep near {spot}.")
    return " ".join(out)


def jobs_page(world: World, draw: Draw) -> str:
    """Some jobs: what is done, where, with what, and who does it."""
    out = []
    for name in draw.selection("jobs", [j.name for j in world.jobs], draw.between(3, 4)):
        for relation in draw.some(tuple(JOB), draw.between(1, 2)):
            out.append(state(fact_of(world, name, relation), draw))
        person = next((p for p in world.people if p.job == name), None)
        if person and draw.chance(0.6):
            out.append(f"{person.name} is {article(name)}.")
    return " ".join(out)


def nature_quiz(world: World, draw: Draw) -> str:
    """Questions and answers about animals, towns and jobs."""
    while True:
        picks = [(a.kind, r) for a in draw.some(world.animals, 2) for r in draw.some(_ANIMAL, 2)]
        picks += [(draw.pick(world.towns).name, draw.pick(_TOWN)), (draw.pick(world.jobs).name, draw.pick(tuple(JOB)))]
        if side("nature quiz", *picks) == draw.split:
            break
    lines = draw.some(picks, len(picks))
    return "\n".join(asked_and_answered(fact_of(world, name, relation), draw) for name, relation in lines)
