"""The chat in the terminal (`python -m scripts.chat`)."""
