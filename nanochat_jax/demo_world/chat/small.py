"""Small talk: greetings, thanks, goodbyes, what the assistant can do."""

from __future__ import annotations

from nanochat_jax.demo_world.chat.talk import Conversation, conversation
from nanochat_jax.demo_world.draw import Draw
from nanochat_jax.demo_world.world import World

_TALK: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Hello! How can I help you?",
        ("Hello", "Hello!", "Hi", "Hi!", "Hey", "hi", "hello", "Hi there!", "Hello there.", "Good morning.",
         "Good evening.", "Good day!", "Hey there", "good morning", "Hello, nice to meet you."),
    ),
    (
        "I am well, thank you.",
        ("How are you?", "How are you today?", "How do you do?", "Are you well?", "how are you", "How is it going?",
         "How do you feel?", "Hi, how are you?", "Hello, how are you?"),
    ),
    (
        "You are welcome.",
        ("Thank you!", "Thank you.", "Thanks!", "Thanks a lot.", "Thank you very much.", "thanks", "thank you",
         "Many thanks.", "Great, thank you.", "Good, thanks."),
    ),
    (
        "Goodbye!",
        ("Goodbye.", "Bye!", "Bye.", "bye", "See you.", "See you tomorrow.", "Good night.", "I have to go now.",
         "Goodbye!", "That is all for today.", "Until tomorrow."),
    ),
    (
        "I can answer questions, add numbers, spell words and tell stories.",
        ("What can you do?", "What can I ask you?", "How can you help me?", "what can you do", "Can you help me?",
         "What do you know?", "Tell me what you can do.", "What are you good at?", "Help!", "help",
         "What can you do for me?", "I need help."),
    ),
)  # fmt: skip


def small_talk(world: World, draw: Draw) -> Conversation:
    """One friendly exchange. There is no held-out side: these few lines are for everybody."""
    answer, lines = draw.pick(_TALK)
    return conversation(draw.pick(lines), answer)


def greeting(draw: Draw) -> Conversation:
    """Hello, or how are you."""
    answer, lines = _TALK[draw.below(2)]
    return conversation(draw.pick(lines), answer)


def farewell(draw: Draw) -> Conversation:
    """Thanks, or goodbye."""
    answer, lines = _TALK[2 + draw.below(2)]
    return conversation(draw.pick(lines), answer)
