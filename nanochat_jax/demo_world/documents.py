"""Documents: what kinds there are, how often each comes, and how to get the one with a given number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from nanochat_jax.demo_world import nature, numbers, people, schoolroom, spelling, stories
from nanochat_jax.demo_world.draw import Draw
from nanochat_jax.demo_world.prose import python_prose
from nanochat_jax.demo_world.world import World, make_world
from nanochat_jax.utils.errors import InputError

PROSE_SHARE = 0.12  # of the characters of the demo mix, as long as there is prose that was not yet used
PROSE_PASSES = {"train": 2, "val": 1}  # how often a prose document may occur


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of document: its weight (how many of all documents, in relation to the others) and its maker."""

    name: str
    weight: int
    make: Callable[[World, Draw], str]


KINDS: tuple[Kind, ...] = (
    Kind("story", 40, stories.story),
    Kind("fable", 9, stories.fable),
    Kind("portrait", 10, people.portrait),
    Kind("introduction", 7, people.introduction),
    Kind("comparison", 4, people.comparison),
    Kind("conversation", 5, people.conversation),
    Kind("letter", 5, people.letter),
    Kind("diary", 5, people.diary),
    Kind("person quiz", 6, people.person_quiz),
    Kind("animal", 8, nature.animal_page),
    Kind("animal pair", 4, nature.animal_pair),
    Kind("animal list", 2, nature.animal_list),
    Kind("town", 6, nature.town_page),
    Kind("jobs", 3, nature.jobs_page),
    Kind("nature quiz", 5, nature.nature_quiz),
    Kind("topic", 9, schoolroom.one_topic),
    Kind("general quiz", 7, schoolroom.general_quiz),
    Kind("lesson", 4, schoolroom.lesson),
    Kind("days", 4, schoolroom.days),
    Kind("list", 5, schoolroom.lists),
    Kind("sums", 9, numbers.sums),
    Kind("row of sums", 2, numbers.row_of_sums),
    Kind("word problems", 6, numbers.word_problems),
    Kind("products", 2, numbers.products),
    Kind("equations", 5, numbers.equations),
    Kind("comparing", 2, numbers.comparing),
    Kind("counting", 3, numbers.counting),
    Kind("spelling", 5, spelling.spelling),
    Kind("letter counting", 4, spelling.letter_counting),
    Kind("spelling game", 3, spelling.spelling_bee),
    Kind("alphabet", 2, spelling.alphabet),
)
_DECK: tuple[Kind, ...] = tuple(kind for kind in KINDS for _ in range(kind.weight))


@dataclass(frozen=True, slots=True)
class WorldDocument:
    """A text and the name of its kind."""

    kind: str
    text: str


def make_document(index: int, split: str, seed: int = 0, world: World | None = None) -> WorldDocument:
    """Document number `index` of `split` with its kind; see `document`. `world` defaults to the public one."""
    draw = Draw(seed, split, index)
    kind = draw.pick(_DECK)
    return WorldDocument(kind.name, kind.make(make_world(0) if world is None else world, draw))


def document(index: int, split: str, seed: int = 0) -> str:
    """The text number `index` (from 0, without end) of `split`: a pure function of its three arguments.

    `split` is "train" or "val"; no sum, spelled word, story or list of facts of one occurs in the other, whatever the
    seeds. `seed` chooses other texts about the same world. Raises ValueError for another split or a negative index.
    """
    return make_document(index, split, seed).text


def documents(seed: int = 0, split: str = "train") -> Iterator[str]:
    """All documents of `split`, from number 0, without end: `document(i, split, seed)` for i = 0, 1, 2, ..."""
    return (document(i, split, seed) for i in count())


def demo_documents(split: str, max_chars: int, seed: int = 0) -> Iterator[str]:
    """The mix on which the demo model is trained: about `max_chars` characters of world and prose.

    Prose is spread evenly: `PROSE_SHARE` of the characters, or less where `max_chars` asks for more prose than there
    is (Python 3.11 gives about 410,000 characters to "train" and 36,000 to "val", so in training the share is 12 % up
    to 6.8 million characters and 8 % at 10 million); each prose document comes at most `PROSE_PASSES` times. The
    stream ends with the first document that reaches `max_chars`. Raises ValueError for a `max_chars` below 1 or
    another split.
    """
    if max_chars < 1:
        raise InputError(f"max_chars must be at least 1, got {max_chars}")
    prose = list(python_prose(split)) * PROSE_PASSES[split]
    share = min(PROSE_SHARE, sum(map(len, prose)) / max_chars)
    # A document is taken from the side that is behind its share, so the mix has no state but the two totals.
    used = total = 0
    waiting = iter(prose)
    world = documents(seed, split)
    while total < max_chars:
        text = next(waiting, None) if used < share * total else None
        if text is None:
            text = next(world)
        else:
            used += len(text)
        total += len(text)
        yield text
