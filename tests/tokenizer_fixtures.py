"""The tokenizer that the golden files were made with, and the golden files themselves."""

import functools
import json
from pathlib import Path
from typing import Any

from nanochat_jax.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def golden(name: str) -> Any:
    """Contents of a golden JSON file."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def golden_tokenizer() -> Tokenizer:
    """The golden files' main tokenizer, from its recorded ranks (not trained)."""
    main = golden("tokenizer_v1")["main"]
    ranks = [bytes([i]) for i in range(256)] + [bytes.fromhex(token) for token, _ in main["merged_ranks"]]
    return Tokenizer(ranks, main["special"])
