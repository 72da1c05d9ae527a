"""The GPT and what it is made of: pure functions over a plain tree of parameters."""
