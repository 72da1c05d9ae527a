"""Short stories with a beginning, a trouble and an end, about the people and animals of the world."""

from nanochat_jax.demo_world.stories.tell import fable, story, story_about

__all__ = ["fable", "story", "story_about"]
