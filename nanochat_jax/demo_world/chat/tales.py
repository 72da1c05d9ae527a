"""Very short stories on request: three to five sentences about a person and a thing."""

from __future__ import annotations

from nanochat_jax.demo_world import lexicon as lex
from nanochat_jax.demo_world.chat.talk import Conversation, conversation
from nanochat_jax.demo_world.draw import Draw
from nanochat_jax.demo_world.people import pair_fields
from nanochat_jax.demo_world.template import capital, fill
from nanochat_jax.demo_world.world import World

_REQUESTS = (
    "Tell me a [short |little |]story about {hero} and {a thing}.",
    "[Please tell|Can you tell] me a [short |]story about {hero} and {a thing}.",
    "Write a [short |little ]story about {hero} and {a thing}.",
    "I want [a|to hear a] story about {hero} and {a thing}.",
    "A [short |]story about {hero} and {a thing}, please.",
    "Tell a story with {hero} and {a thing}.",
)
_PLOTS = (
    "One day {hero} found {a thing} {at}. It belonged to {hero2}. {hero} took the {thing} to {hero2}. "
    '"Thank you!" said {hero2}, and they played together until evening.',
    "{hero} had lost {his} {thing}. {He} looked for it at home and {at}. {hero2} helped {him}. In the end they found "
    "the {thing} {hiding}. {hero} was very {feeling}.",
    '{hero} wanted {a thing} for {his} birthday. {hero2} came with a box. "Open it," said {hero2}. In the box was '
    "{a shade} {thing}. {hero} was very {feeling}.",
    "{hero} and {hero2} both wanted the {thing}. They pulled, and the {thing} broke. Both were sad. Then they mended "
    "it together, and after that they shared it.",
    "One morning {hero} went to {place} with {his} {thing}. There {he} met a little {beast}. The {beast} was hungry, "
    "so {hero} gave it some {food}. From that day on they were friends.",
    "{hero} put {his} {thing} {hiding}. The next day it was gone. {pet}, the {kind}, had carried it to {place}. "
    "{hero} laughed and took the {thing} home.",
    "It rained all day. {hero} and {hero2} sat at home and made {a thing} out of paper. It was {shade} and beautiful. "
    "When the sun came out, they showed it to everyone {at}.",
    "{hero} gave {his} old {thing} to {hero2}. {hero2} was very {feeling}. The next day {hero2} brought {hero} some "
    '{food}. "Friends share," said {hero2}.',
)


def story_request(world: World, draw: Draw) -> Conversation:
    """Somebody asks for a story and gets one. (hero, thing) belongs to one split."""
    names = tuple(person.name for person in world.children)
    hero, thing = draw.combination("tale", names, lex.THINGS)
    place, at = draw.pick(lex.PLACES)
    fields = pair_fields(world, hero) | {
        "thing": thing, "place": place, "at": at, "hiding": draw.pick(lex.HIDING),
        "shade": draw.pick(lex.COLORS), "feeling": draw.pick(lex.FEELINGS),
    }  # fmt: skip
    return conversation(fill(draw.pick(_REQUESTS), draw, fields), capital(fill(draw.pick(_PLOTS), draw, fields)))
