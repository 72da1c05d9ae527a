"""Conversations about the small world, to teach a model that has read its documents to answer.

Every conversation is a pure function of (seed, split, index) through `Draw`, and, like the documents, combinations
of one split do not occur in the other. `KINDS` maps a kind's name to its maker; multiple choice is in `choice`.
"""

from nanochat_jax.demo_world.chat.choice import LETTERS, Quiz, animal_quiz, quiz
from nanochat_jax.demo_world.chat.identity import NAME, identity
from nanochat_jax.demo_world.chat.kinds import KINDS, draw_for
from nanochat_jax.demo_world.chat.talk import Conversation

__all__ = ["KINDS", "LETTERS", "NAME", "Conversation", "Quiz", "animal_quiz", "identity", "draw_for", "quiz"]
