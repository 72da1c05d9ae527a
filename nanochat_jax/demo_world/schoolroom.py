"""Texts about simple facts of the real world: capitals, opposites, days and months, planets, colors, plurals."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

from nanochat_jax.demo_world.draw import Draw, side
from nanochat_jax.demo_world.lexicon import BY_HEART, DAYS, number_word
from nanochat_jax.demo_world.relations import GENERAL, ask, asked_and_answered, state
from nanochat_jax.demo_world.tables import read_table
from nanochat_jax.demo_world.template import capital, fill, join_words
from nanochat_jax.demo_world.world import Fact, World, facts

_PHRASES = read_table("documents")
_UNORDERED = ("senses", "continents")  # their first and last mean nothing


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
    return "\n".join(asked_and_answered(fact, draw) for fact in _mixed(world, draw, "general quiz", 4, 7))


def lesson(world: World, draw: Draw) -> str:
    """A teacher asks, children answer."""
    chosen = _mixed(world, draw, "lesson", 3, 5)
    teacher = next(p for p in world.people if p.job == "teacher")
    pupils = draw.some(world.children, len(chosen))
    phrases, name = _PHRASES["lesson"], {"name": teacher.name}
    out = [fill(draw.pick(phrases["begin"]), draw, name)]
    for fact, pupil in zip(chosen, pupils, strict=True):
        answer = capital(state(fact, draw))[:-1]
        out.append(
            f'"{ask(fact, draw)}" asks {teacher.name}. "{answer}," {draw.pick(("says", "answers"))} {pupil.name}.'
        )
    out.append(fill(draw.pick(phrases["end"]), draw, name))
    return "\n".join(out).strip()


def days(world: World, draw: Draw) -> str:
    """Yesterday, today and tomorrow."""
    while True:
        main, other = draw.below(7), draw.below(7)
        order = draw.some(range(6), draw.between(3, 5))
        starts = [main if draw.chance(0.6) else other for _ in order]
        if side("days", *starts, *order) == draw.split:
            break
    phrases = _PHRASES["days"]
    out = [fill(phrases["lines"][k], draw, _four_days(n)) for n, k in zip(starts, order, strict=True)]
    if draw.chance(0.3):
        out.insert(0, fill(phrases["week"], draw, {"days": join_words(list(DAYS))}))
    return " ".join(out)


def _four_days(n: int) -> dict[str, str]:
    return {name: DAYS[(n + k) % 7] for k, name in enumerate(("before", "today", "after", "then"), -1)}


def lists(world: World, draw: Draw) -> str:
    """Things that everyone knows by heart, and what is first, last and next in them."""
    phrases = _PHRASES["lists"]
    names = tuple(phrases)
    while True:
        index, start = draw.below(len(names)), draw.below(12)
        extra = draw.some(_by_relation(world)[draw.pick(_topics(world))], 2)
        if side("list", index, *extra) == draw.split:
            break
    name = names[index]
    items = BY_HEART[name]
    out = [fill(draw.pick(phrases[name]), draw, {"items": join_words(list(items))})]
    i = start % (len(items) - 1)
    about = (
        f"The first is {items[0]} and the last is {items[-1]}.",
        f"{capital(items[i])} comes before {items[i + 1]}.",
        f"{capital(items[i + 1])} comes after {items[i]}.",
        f"There are {number_word(len(items))} of them.",
    )
    out += draw.some(about[1:] if name in _UNORDERED else about, 2)
    out += [capital(state(fact, draw)) for fact in extra]
    return " ".join(out)
