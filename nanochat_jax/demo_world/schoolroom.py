"""Texts about simple facts of the real world: capitals, opposites, days and months, planets, colors, plurals."""

from __future__ import annotations

from collections import defaultdict
from functools import cache, lru_cache

from nanochat_jax.demo_world import general as g
from nanochat_jax.demo_world.draw import Draw, side
from nanochat_jax.demo_world.relations import GENERAL, ask, short_answer, state
from nanochat_jax.demo_world.template import capital, join_words
from nanochat_jax.demo_world.world import Fact, World, facts


@lru_cache(maxsize=8)
def _by_relation(world: World) -> dict[str, tuple[Fact, ...]]:
    groups: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts(world):
        if fact.relation in GENERAL:
            groups[fact.relation].append(fact)
    return {relation: tuple(group) for relation, group in groups.items()}


@lru_cache(maxsize=8)
def _topics(world: World) -> tuple[str, ...]:
    # relations with many facts come up more often, but a short list is not drowned by a long one
    return tuple(r for r, group in _by_relation(world).items() for _ in range(1 + len(group) // 8))


def one_topic(world: World, draw: Draw) -> str:
    """Several facts of one kind: some capitals, some opposites, ..."""
    groups = _by_relation(world)
    while True:
        relation = draw.pick(_topics(world))
        chosen = draw.some(groups[relation], draw.between(4, 7))
        if side("topic", *chosen) == draw.split:
            break
    return " ".join(capital(state(fact, draw)) for fact in chosen)


def _mixed(world: World, draw: Draw, kind: str, low: int, high: int) -> list[Fact]:
    groups = _by_relation(world)
    while True:
        chosen = [draw.pick(groups[draw.pick(_topics(world))]) for _ in range(draw.between(low, high))]
        if len(set(chosen)) == len(chosen) and side(kind, *chosen) == draw.split:
            return chosen


def general_quiz(world: World, draw: Draw) -> str:
    """Questions and answers about the real world."""
    out = []
    for fact in _mixed(world, draw, "general quiz", 4, 7):
        answer = capital(short_answer(fact, draw)) + "." if draw.chance(0.3) else capital(state(fact, draw))
        out.append(f"{ask(fact, draw)} {answer}")
    return "\n".join(out)


def lesson(world: World, draw: Draw) -> str:
    """A teacher asks, children answer."""
    chosen = _mixed(world, draw, "lesson", 3, 5)
    teacher = next(p for p in world.people if p.job == "teacher")
    pupils = draw.some(world.children, len(chosen))
    name = teacher.name
    begin = (
        f"Today {name} the teacher asks many questions.",
        f"{name} stands at the blackboard.",
        "The lesson begins.",
    )
    out = [draw.pick(begin)]
    for fact, pupil in zip(chosen, pupils, strict=True):
        answer = capital(state(fact, draw))[:-1]
        out.append(
            f'"{ask(fact, draw)}" asks {teacher.name}. "{answer}," {draw.pick(("says", "answers"))} {pupil.name}.'
        )
    out.append(draw.pick((f'"Very good," says {teacher.name}.', "Everyone claps.", "Then the bell rings.", "")))
    return "\n".join(out).strip()


def days(world: World, draw: Draw) -> str:
    """Yesterday, today and tomorrow."""
    while True:
        main, other = draw.below(7), draw.below(7)
        order = draw.some(range(6), draw.between(3, 5))
        starts = [main if draw.chance(0.6) else other for _ in order]
        if side("days", *starts, *order) == draw.split:
            break
    out = [_day_sentences(n)[k] for n, k in zip(starts, order, strict=True)]
    if draw.chance(0.3):
        out.insert(0, f"The days of the week are {join_words(list(g.DAYS))}.")
    return " ".join(out)


@cache
def _day_sentences(n: int) -> tuple[str, ...]:
    before, day, after, then = (g.DAYS[(n + k) % 7] for k in (-1, 0, 1, 2))
    return (
        f"If yesterday was {day}, then tomorrow will be {then}.",
        f"If yesterday was {day}, then today is {after}.",
        f"If today is {day}, then tomorrow will be {after}.",
        f"If today is {day}, then yesterday was {before}.",
        f"If tomorrow is {after}, then today is {day}.",
        f"The day after {day} is {after}, and the day before {day} is {before}.",
    )


_LISTS = (
    (("The planets of the solar system are: {}.", "The eight planets are {}.", "Around the sun go {}."), g.PLANETS),
    (("The days of the week are {}.", "The seven days are: {}."), g.DAYS),
    (("The months of the year are {}.", "The twelve months are: {}."), g.MONTHS),
    (("The four seasons are {}.", "The seasons of the year are: {}."), g.SEASONS),
    (("The colors of the rainbow are {}.", "A rainbow has these colors: {}."), g.RAINBOW),
    (("The five senses are {}.",), ("seeing", "hearing", "smelling", "tasting", "feeling")),
    (
        ("The continents are {}.",),
        ("Africa", "Antarctica", "Asia", "Australia", "Europe", "North America", "South America"),
    ),
)


def lists(world: World, draw: Draw) -> str:
    """Things that everyone knows by heart, and what is first, last and next in them."""
    while True:
        index, start = draw.below(len(_LISTS)), draw.below(12)
        extra = draw.some(_by_relation(world)[draw.pick(_topics(world))], 2)
        if side("list", index, *extra) == draw.split:
            break
    heads, items = _LISTS[index]
    out = [draw.pick(heads).format(join_words(list(items)))]
    i = start % (len(items) - 1)
    about = (
        f"The first is {items[0]} and the last is {items[-1]}.",
        f"{capital(items[i])} comes before {items[i + 1]}.",
        f"{capital(items[i + 1])} comes after {items[i]}.",
        f"There are {('two three four five six seven eight nine ten eleven twelve').split()[len(items) - 2]} of them.",
    )
    out += draw.some(about[1:] if items[0] in ("Africa", "seeing") else about, 2)
    out += [capital(state(fact, draw)) for fact in extra]
    return " ".join(out)
