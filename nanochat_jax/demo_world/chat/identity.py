"""Who the assistant is. The phrasings of one side are not met on the other."""

from __future__ import annotations

from functools import cache

from nanochat_jax.demo_world.chat.talk import Conversation, conversation
from nanochat_jax.demo_world.draw import Draw, side
from nanochat_jax.demo_world.world import World

NAME = "nanochat"

# Which question gets which answer; {name} is the assistant's name.
_ASKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "My name is {name}.",
        (
            "what is your name", "what's your name", "your name", "your name please", "what is your name please",
            "tell me your name", "please tell me your name", "can you tell me your name", "may I know your name",
            "could you tell me your name", "do you have a name", "what name do you have", "say your name",
            "what are you called", "what do people call you", "how are you called", "what should I call you",
            "how should I call you", "what can I call you", "how can I call you", "by what name do you go",
            "I want to know your name", "I would like to know your name", "what was your name again", "name please",
            "so what is your name", "and what is your name", "what name did they give you", "is there a name for you",
        ),
    ),
    (
        "I am {name}.",
        (
            "who are you", "who are you then", "who is this", "who is there", "who am I talking to", "who is speaking",
            "who are you please", "tell me who you are", "please tell me who you are", "can you tell me who you are",
            "could you say who you are", "who is it", "say who you are", "I do not know who you are",
            "I want to know who you are", "do I know you", "who am I speaking with", "with whom am I talking",
            "who do I talk to", "and who are you", "so who are you", "but who are you", "who is answering me",
            "who is on the other side", "do you know who you are", "who might you be",
        ),
    ),
    (
        "I am {name}, a small language model.",
        (
            "what are you", "what kind of thing are you", "are you a person", "are you a human", "are you a robot",
            "are you a machine", "are you a language model", "are you an AI", "tell me about yourself",
            "tell me something about yourself", "introduce yourself", "please introduce yourself",
            "can you introduce yourself", "what exactly are you", "are you real", "describe yourself",
            "please describe yourself", "I want to know more about you", "say something about yourself",
            "what sort of program are you", "are you a computer", "are you a chat bot",
        ),
    ),
)  # fmt: skip
_BEFORE = ("Hello! ", "Hi! ", "Hi, ", "Hello, ", "Good morning. ", "Sorry, ", "Hey, ", "Excuse me, ")
_STATEMENTS = ("tell", "say", "please", "introduce", "describe", "i ")
TYPO_SHARE = 0.1
_KEYS = "abcdefghijklmnopqrstuvwxyz"


@cache
def _phrasings(split: str) -> tuple[tuple[str, str], ...]:
    """(question, answer) of one side; the first question of every answer is for training, so both sides have some."""
    out = []
    for answer, questions in _ASKED:
        for i, question in enumerate(questions):
            where = "train" if i == 0 else side("identity", question)
            if where == split:
                out.append((question, answer))
    return tuple(out)


def _with_typo(text: str, draw: Draw) -> str:
    """`text` with one letter dropped, doubled, exchanged with the next or replaced."""
    i, how = draw.pick([i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha()]), draw.below(4)
    if how == 0:
        return text[:i] + text[i + 1 :]
    if how == 1:
        return text[:i] + text[i] + text[i:]
    if how == 2:
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    return text[:i] + draw.pick(_KEYS) + text[i + 1 :]


def asked_for(draw: Draw) -> tuple[str, str]:
    """A question about the assistant and its answer with {name} in it."""
    question, answer = draw.pick(_phrasings(draw.split))
    mark = "." if question.lower().startswith(_STATEMENTS) else "?"
    if draw.chance(TYPO_SHARE):
        question = _with_typo(question, draw)
    style = draw.below(10)
    if style < 6:
        question = question[:1].upper() + question[1:] + mark
    elif style < 8:
        question = draw.pick(_BEFORE) + question + mark
    elif style < 9:
        question = question.lower() + mark
    else:
        question = question.lower()
    return question, answer


def identity(world: World, draw: Draw, name: str = NAME) -> Conversation:
    """Somebody asks the assistant who it is. The conversation also carries `name`."""
    question, answer = asked_for(draw)
    return conversation(question, answer.format(name=name), name=name)
