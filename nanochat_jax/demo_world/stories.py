"""Short stories with a beginning, a trouble and an end, about the people and animals of the world.

A story is a plot with a hero and values for its slots, chosen for the split.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

from nanochat_jax.demo_world import lexicon as lex
from nanochat_jax.demo_world.draw import Draw, side
from nanochat_jax.demo_world.people import pair_fields, person_fields
from nanochat_jax.demo_world.plots import BESIDE, FABLES, POOLS, STORIES, Plot
from nanochat_jax.demo_world.world import World

# The field that a slot fills, where it has another name.
_FIELD_OF = {"fragile": "thing", "color": "shade", "child": "newname", "animal helper": "helper", "fish color": "fish"}


@lru_cache(maxsize=8)
def _slots(world: World) -> dict[str, tuple]:
    """The pool behind every slot name."""
    young = tuple(a for a in world.animals if a.group in ("mammal", "bird") and a.kind not in BESIDE["far_away"])
    return {
        **POOLS, "place": lex.PLACES, "open place": tuple(p for p in lex.PLACES if p[0] not in BESIDE["indoors"]),
        "thing": lex.THINGS, "hiding": lex.HIDING, "color": lex.COLORS, "fruit": lex.FRUITS,
        "vegetable": lex.VEGETABLES, "flower": lex.FLOWERS, "adult": world.adults, "rival": world.children,
        "baby": young, "two animals": tuple(a for a in world.animals if a.food not in BESIDE["silent_foods"]),
    }  # fmt: skip


@cache
def _neighbors(world: World, town: str) -> tuple:
    return tuple(p for p in world.adults if p.home == town)


def _fill_slot(world: World, slot: str, value: Any, fields: dict[str, str], draw: Draw) -> bool:
    """Adds the fields of one slot; False when the value does not go with what is chosen already."""
    if slot in ("place", "open place"):
        fields["place"], fields["at"] = value
    elif slot in ("adult", "neighbor"):
        if slot == "adult" and value.home == fields["town"]:
            return False  # this plot needs a way to walk
        fields.update(person_fields(world, value.name, "3"))
    elif slot == "corner":
        fields["corner"], fields["fear"] = value, draw.pick(BESIDE["fear"])
    elif slot == "sound":
        fields["sound"], fields["picking"] = value, draw.pick(BESIDE["picking"])
    elif slot == "nose":
        fields["nose2"] = value
        fields["nose1"] = draw.pick([nose for nose in POOLS["nose"] if nose != value])
    elif slot == "baby":
        fields["young"], fields["parent"], fields["den"] = value.young, value.kind, value.home
    elif slot == "rival":
        if value.name in (fields["hero"], fields["hero2"]):
            return False
        fields["rival"], fields["hisr"] = value.name, value.his
    else:
        fields[_FIELD_OF.get(slot, slot)] = value
    return True


def _choose(world: World, draw: Draw, plots: tuple[Plot, ...], heroes: tuple) -> tuple[Plot, Any, tuple]:
    pools = _slots(world)
    while True:
        plot, hero = draw.pick(plots), draw.pick(heroes)
        values = tuple(
            draw.pick(_neighbors(world, hero.home) if slot == "neighbor" else pools[slot]) for slot in plot.slots
        )
        names = [getattr(v, "name", None) or getattr(v, "kind", None) or v for v in values]
        if side("story", plot.name, getattr(hero, "name", None) or hero.kind, *names) == draw.split:
            return plot, hero, values


def story(world: World, draw: Draw) -> str:
    """A story with a child as hero."""
    while True:
        plot, hero, values = _choose(world, draw, STORIES, world.children)
        fields = dict(pair_fields(world, hero.name))
        fields["person"] = "girl" if hero.pronoun == "she" else "boy"
        if all([_fill_slot(world, slot, value, fields, draw) for slot, value in zip(plot.slots, values, strict=True)]):
            return plot.template.render(draw, fields)


def _animal_fields(a: lex.Animal, tag: str) -> dict[str, str]:
    return {tag: a.kind, "food_" + tag: a.food, "home_" + tag: a.home, "can_" + tag: "can " + a.can}


def fable(world: World, draw: Draw) -> str:
    """A story in which two animals speak."""
    speakers = _slots(world)["two animals"]
    while True:
        plot, hero, values = _choose(world, draw, FABLES, speakers)
        other = values[0]
        if other is hero or other.food == hero.food or other.home == hero.home or other.can == hero.can:
            continue
        fields = _animal_fields(hero, "a") | _animal_fields(other, "b")
        for slot, value in zip(plot.slots[1:], values[1:], strict=True):
            _fill_slot(world, slot, value, fields, draw)
        if fields.get("judge") in (hero.kind, other.kind):
            continue
        return plot.template.render(draw, fields)
