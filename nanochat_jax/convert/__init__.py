"""Models from elsewhere and for elsewhere: the reference's files, Hugging Face folders, safetensors."""

from nanochat_jax.utils.errors import UserError


class InterchangeError(UserError, ValueError):
    """A file that cannot be imported or a model that cannot be exported; the message names it and the remedy."""
