"""A small consistent world and endless simple English about it, for training without a network.

The world is data (`make_world`, `facts`), the sentences know how to state and ask each fact (`relations`), and every
document is a pure function of its number (`document`), with training and held-out text disjoint by construction
(`chance`). `demo_documents` is the mix the demo trains on.
"""

from nanochat_jax.demo_world.documents import KINDS, demo_documents, document, documents, make_document
from nanochat_jax.demo_world.draw import Draw, side, sum_side, word_side
from nanochat_jax.demo_world.prose import python_prose
from nanochat_jax.demo_world.world import Fact, Person, World, facts, lookup, make_world

__all__ = [
    "KINDS", "Draw", "Fact", "Person", "World", "demo_documents", "document", "documents", "facts", "lookup",
    "make_document", "make_world", "python_prose", "side", "sum_side", "word_side",
]  # fmt: skip
