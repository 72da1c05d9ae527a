"""Models from elsewhere and for elsewhere: the reference's files, Hugging Face folders, safetensors."""


class InterchangeError(ValueError):
    """A file that cannot be imported or a model that cannot be exported; the message names it and the remedy."""
