"""Conversations that teach a model who it is, made from templates: no network, no other model.

They say its name, who made it, that it is a small language model trained with nanochat_jax (open source, MIT), that it
works best in English, and what it cannot do. People greet it politely, shout, mistype, leave out punctuation, try other
languages, and ask further. One phrasing in five (questions, greetings, links and closings alike) is used for
``split="val"`` only, so what is asked there is never met in training. The phrasings are in identity.toml.

The demo has its own, far simpler questions (``nanochat_jax.demo_world.chat.identity``): these need more English.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from nanochat_jax.demo_world.draw import SPLITS, VAL, Draw
from nanochat_jax.demo_world.spelling import mistyped, places_of_typos
from nanochat_jax.demo_world.tables import read_table
from nanochat_jax.demo_world.template import fill
from nanochat_jax.utils.errors import InputError
from nanochat_jax.utils.paths import write_atomic

PHRASES = read_table("identity", "tasks")
TOPICS = PHRASES["topic"]
HELD_OUT_ONE_IN = 5


def phrasings(phrases: Sequence[Any], split: str) -> Sequence[Any]:
    """The phrases that ``split`` may use: every fifth is for "val", the others for "train"."""
    held_out = phrases[HELD_OUT_ONE_IN - 1 :: HELD_OUT_ONE_IN]
    return held_out if split == VAL else [p for i, p in enumerate(phrases) if (i + 1) % HELD_OUT_ONE_IN]


def identity_conversations(
    name: str, creator: str = "", n: int = 1000, seed: int = 0, split: str = "train"
) -> list[dict[str, Any]]:
    """``n`` conversations that teach a model its ``name`` and who made it (left open where ``creator`` is empty).

    The same arguments give the same conversations, and number i does not depend on n. Nothing the user says in
    ``split="val"`` is said in "train". Raises ValueError for an empty name, another split or a negative n.
    """
    name, creator = " ".join(name.split()), " ".join(creator.split())
    if not name:
        raise InputError("the name is empty; give the model one")
    if split not in SPLITS:
        raise InputError(f"split {split!r} is none of {', '.join(SPLITS)}")
    if n < 0:
        raise InputError(f"n is {n}; it must be 0 or more")
    return [{"messages": _conversation(Draw(seed, split, index), name, creator)} for index in range(n)]


def write_identity_file(
    path: str | Path, name: str, creator: str = "", n: int = 1000, seed: int = 0, split: str = "train"
) -> Path:
    """Writes ``identity_conversations`` as the reference's file does: one JSON array of messages a line."""
    conversations = identity_conversations(name, creator, n, seed, split)
    lines = [json.dumps(conversation["messages"], ensure_ascii=False) + "\n" for conversation in conversations]
    write_atomic(path, "".join(lines))
    return Path(path)


def _conversation(draw: Draw, name: str, creator: str) -> list[dict[str, str]]:
    fields = {
        "name": name,
        "creator": creator,
        "made": f"made by {creator}" if creator else "trained with nanochat_jax",
    }
    style = draw.below(100)
    messages: list[dict[str, str]] = []

    def say(user: str, replies: Sequence[str], **more: str) -> None:
        answer = fill(draw.pick(replies), draw, {**fields, **more})
        for value in (name, creator):
            if value.endswith((".", "!", "?")):  # such a name ends the sentence
                answer = answer.replace(value + ".", value)
        messages.append({"role": "user", "content": _styled(user, style, draw)})
        messages.append({"role": "assistant", "content": answer})

    def pick(phrases: Sequence[str]) -> str:
        return fill(draw.pick(phrasings(phrases, draw.split)), draw, fields)

    opening = draw.below(100)
    topic = draw.pick([i for i, topic in enumerate(TOPICS) for _ in range(topic["opens"])])
    asked = {topic}
    question = pick(TOPICS[topic]["questions"])
    if opening < 12:
        say(pick(PHRASES["greetings"]) + draw.pick(("", "!", ".", "!!")), PHRASES["greeting_replies"])
    elif opening < 20:
        greeting, language = draw.pick(phrasings(PHRASES["foreign"], draw.split))
        say(greeting + draw.pick(("", "!", ".")), PHRASES["foreign_replies"], greeting=greeting, language=language)
    elif opening < 50:
        question = _joined(pick(PHRASES["greetings"]) + draw.pick(("!", ",", ".", " -")), question)
    if opening >= 20 or draw.chance(0.6):
        say(question, _answers(topic, creator))
        for _ in range(draw.pick((0, 0, 0, 1, 1, 2, 3))):
            topic = draw.pick([i for i in range(len(TOPICS)) if i not in asked])
            asked.add(topic)
            question = pick(TOPICS[topic]["questions"])
            say(_joined(pick(PHRASES["links"]), question) if draw.chance(0.4) else question, _answers(topic, creator))
    if draw.chance(0.15):
        say(pick(PHRASES["closings"]), PHRASES["closing_replies"])
    return messages


def _answers(topic: int, creator: str) -> Sequence[str]:
    answers = TOPICS[topic]
    return answers["answers"] if creator else answers.get("answers_without_creator", answers["answers"])


def _joined(before: str, question: str) -> str:
    """Both in one line; the question continues in lower case where ``before`` does not end a sentence."""
    new_sentence = before.endswith((".", "!")) or question.startswith(("I ", "I'"))
    return f"{before} {question if new_sentence else question[0].lower() + question[1:]}"


def _styled(text: str, style: int, draw: Draw) -> str:
    """The text as this person types: neatly (55 in 100), in lower case, shouting, with typos, or with many marks."""
    if style < 55:
        return text
    if style < 67:
        return text.lower()
    if style < 77:
        return text.lower().rstrip("?!.")
    if style < 84:
        return text.upper() + draw.pick(("", "", "!", "!!!"))
    if style < 90:
        return text.rstrip("?!.") + draw.pick(("??", "???", "?!", "...", "!!"))
    return _mistyped(text, draw) if style < 96 else _mistyped(text.lower(), draw).rstrip("?!.")


def _mistyped(text: str, draw: Draw) -> str:
    """The text with a typo in one of its words."""
    places = places_of_typos(text)
    if len(places) < 3:  # in a word of three letters, a typo could make another word
        return text
    return mistyped(text, draw.pick(places), draw.below(4), draw.pick(ascii_lowercase))
