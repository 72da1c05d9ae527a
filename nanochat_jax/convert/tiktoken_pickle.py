"""The reference's `tokenizer.pkl`, a pickled tiktoken `Encoding`, in and out, without executing it."""

from pathlib import Path
from typing import Any

from nanochat_jax.convert import InterchangeError, pickles
from nanochat_jax.text.chat_format import BOS
from nanochat_jax.text.tokenizer import Tokenizer, TokenizerError

_ENCODING = ("tiktoken.core", "Encoding")
_FIELDS = {"name", "pat_str", "mergeable_ranks", "special_tokens"}


def read(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.pkl`. Raises InterchangeError, naming the file, for anything else.

    Bos is `<|bos|>`, or `<|endoftext|>` where there is none.
    """
    encoding = pickles.read(path.read_bytes(), {".".join(_ENCODING): None}, str(path))
    state = encoding.state if isinstance(encoding, pickles.State) else None
    if isinstance(state, str):
        return Tokenizer.from_tiktoken(state)  # a stock encoding is pickled by its name
    if not isinstance(state, dict) or not _FIELDS <= state.keys():
        raise InterchangeError(f"{path} does not hold a tiktoken encoding with {', '.join(sorted(_FIELDS))}")
    return _tokenizer(state["mergeable_ranks"], state["special_tokens"], state["pat_str"], path)


def _tokenizer(ranks: Any, special: Any, pattern: Any, path: Path) -> Tokenizer:
    fits = (
        isinstance(ranks, dict)
        and isinstance(special, dict)
        and isinstance(pattern, str)
        and all(isinstance(k, bytes) and isinstance(v, int) for k, v in ranks.items())
        and all(isinstance(k, str) and isinstance(v, int) for k, v in special.items())
    )
    if not fits:
        raise InterchangeError(f"{path}: the fields of its encoding have other types than tiktoken's")
    tokens = sorted(ranks, key=lambda token: ranks[token])
    if [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise InterchangeError(f"{path}: its token ids have gaps, which is not supported")
    try:
        return Tokenizer(tokens, special, pattern, bos=BOS if BOS in special else "<|endoftext|>")
    except (TokenizerError, ValueError) as error:
        raise InterchangeError(f"{path}: {error}") from error


def dumps(tokenizer: Tokenizer) -> bytes:
    """The bytes of a `tokenizer.pkl` that the reference loads: an `Encoding` named rustbpe."""
    p = pickles.Writer().name(*_ENCODING).mark().tuple().new()
    p.dict().mark().text("name").text("rustbpe").text("pat_str").text(tokenizer.pattern).text("mergeable_ranks")
    p.dict().mark()
    for rank, token in enumerate(tokenizer.ranks):
        p.raw(token).integer(rank)
    p.set_items().text("special_tokens").dict().mark()
    for name, token in tokenizer.special_tokens.items():
        p.text(name).integer(token)
    return p.set_items().set_items().build().done()
