"""Tells a story: chooses plot, hero and slots for the split, and fills the plot's text."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

from nanochat_jax.demo_world import lexicon as lex
from nanochat_jax.demo_world.draw import Draw, side
from nanochat_jax.demo_world.people import pair_fields, person_fields
from nanochat_jax.demo_world.stories import fables, plots_home, plots_outside
from nanochat_jax.demo_world.stories.plot import Plot
from nanochat_jax.demo_world.world import Animal, World

STORIES: tuple[Plot, ...] = plots_home.PLOTS + plots_outside.PLOTS
FABLES: tuple[Plot, ...] = fables.PLOTS

_NEW_CHILDREN = ("Emma", "Jack", "Lily", "Max", "Zoe", "Ben", "Ella", "Tim")
_GUESTS = ("mouse", "squirrel", "owl", "rabbit", "frog", "bat")
_HELPERS = ("squirrel", "cat", "parrot")
_CORNERS = (
    "the cupboard",
    "the chimney",
    "the bread box",
    "the old clock",
    "the woodpile",
    "the flour bag",
    "the umbrella stand",
)
_TREES = ("apple", "oak", "pear", "pine", "cherry", "willow")
_MISSING = ("flour", "sugar", "butter", "salt", "milk", "honey")
_ROLES = ("dragon", "pirate", "wizard", "knight", "owl", "giant", "lion", "clown")
_OUTSIDE = (
    "in the hay",
    "behind the woodpile",
    "under a pear tree",
    "behind the barn",
    "in the high grass",
    "between two bushes",
)
_FRAGILE = ("drum", "lantern", "bell", "cup", "flute", "whistle", "umbrella", "music box", "puppet", "toy boat", "kite")
_INDOORS = ("the mill", "the library", "the station", "the toy shop", "the school", "the bakery")
_SKILLS = (
    "play the flute", "whistle", "tie a knot", "juggle three balls", "walk on stilts", "knit a scarf", "draw a horse",
    "stand on one hand", "jump rope", "throw a ball very far", "fly a kite",
)  # fmt: skip
_PRIZES = ("golden cup", "new bicycle", "silver medal", "basket of cherries", "painted drum", "big cake")
_HIDDEN = ("a glass marble", "an old coin", "a small silver bell", "a blue feather", "seven shells", "a tin soldier")
_SOUNDS = (
    "a bell", "the sound of a flute", "a dog that barked", "the beat of a hammer", "somebody singing", "a rooster",
)  # fmt: skip
_PICKING = ("looking for mushrooms", "picking berries", "gathering wood", "walking in the hills")
_NOSES = ("a carrot", "a red pepper", "a pine cone", "an onion", "a potato", "a wooden spoon", "a pear")
_WISHES = (
    "a castle",
    "a ship with white sails",
    "a horse that could fly",
    "a mountain of gold",
    "a hat that makes you invisible",
)
_FISH = ("silver", "golden", "blue", "red", "green")


@lru_cache(maxsize=8)
def _slots(world: World) -> dict[str, tuple]:
    """The pool behind every slot name."""
    far_away = ("whale", "lion", "elephant", "penguin", "parrot", "cat", "dog", "cow", "horse", "bear", "wolf")
    young = tuple(a for a in world.animals if a.group in ("mammal", "bird") and a.kind not in far_away)
    speakers = tuple(a for a in world.animals if a.food not in ("mice", "meat", "moths", "flies", "krill", "nectar"))
    return {
        "place": lex.PLACES, "thing": lex.THINGS, "hiding": lex.HIDING, "color": lex.COLORS, "fruit": lex.FRUITS,
        "vegetable": lex.VEGETABLES, "flower": lex.FLOWERS, "adult": world.adults, "child": _NEW_CHILDREN,
        "guest": _GUESTS, "outside": _OUTSIDE, "fragile": _FRAGILE,
        "open place": tuple(p for p in lex.PLACES if p[0] not in _INDOORS), "corner": _CORNERS,
        "tree": _TREES, "missing": _MISSING, "role": _ROLES, "skill": _SKILLS, "prize": _PRIZES,
        "hidden": _HIDDEN, "sound": _SOUNDS, "nose": _NOSES, "wish": _WISHES, "fish color": _FISH,
        "planet": ("Venus", "Mars", "Jupiter", "Saturn"), "animal helper": _HELPERS, "baby": young,
        "rival": world.children, "two animals": speakers, "judge": ("owl", "bear", "turtle"),
    }  # fmt: skip


@cache
def _neighbors(world: World, town: str) -> tuple:
    return tuple(p for p in world.adults if p.home == town)


def _fill_slot(world: World, slot: str, value: Any, fields: dict[str, str], draw: Draw) -> bool:
    """Adds the fields of one slot; False when the value does not go with what is chosen already."""
    if slot in ("place", "open place"):
        fields["place"], fields["at"] = value
    elif slot == "fragile":
        fields["thing"] = value
    elif slot == "color":
        fields["shade"] = value
    elif slot in ("adult", "neighbor"):
        if slot == "adult" and value.home == fields["town"]:
            return False  # this plot needs a way to walk
        fields.update(person_fields(world, value.name, "3"))
    elif slot == "child":
        fields["newname"] = value
    elif slot == "corner":
        fields["corner"], fields["fear"] = value, draw.pick(("ghost", "giant", "monster"))
    elif slot == "animal helper":
        fields["helper"] = value
    elif slot == "fish color":
        fields["fish"] = value
    elif slot == "sound":
        fields["sound"], fields["picking"] = value, draw.pick(_PICKING)
    elif slot == "nose":
        fields["nose2"] = value
        fields["nose1"] = draw.pick([nose for nose in _NOSES if nose != value])
    elif slot == "baby":
        fields["young"], fields["parent"], fields["den"] = value.young, value.kind, value.home
    elif slot == "rival":
        if value.name in (fields["hero"], fields["hero2"]):
            return False
        fields["rival"], fields["hisr"] = value.name, value.his
    else:
        fields[slot] = value
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


def story_about(world: World, draw: Draw, heroes: tuple) -> str:
    """A story whose hero is one of `heroes` (persons of `world`)."""
    while True:
        plot, hero, values = _choose(world, draw, STORIES, heroes)
        fields = dict(pair_fields(world, hero.name))
        girl = hero.pronoun == "she"
        fields["person"] = ("girl" if girl else "boy") if hero.is_child else ("woman" if girl else "man")
        if all([_fill_slot(world, slot, value, fields, draw) for slot, value in zip(plot.slots, values, strict=True)]):
            return plot.template.render(draw, fields)


def story(world: World, draw: Draw) -> str:
    """A story with a child as hero."""
    return story_about(world, draw, world.children)


def _animal_fields(a: Animal, tag: str) -> dict[str, str]:
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


def plots() -> tuple[str, ...]:
    """The names of all plots, stories first."""
    return tuple(plot.name for plot in STORIES + FABLES)
