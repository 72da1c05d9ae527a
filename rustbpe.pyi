"""Byte-pair encoding in Rust: train on a stream of texts, encode to lists or straight into NumPy arrays.

And three kernels that have nothing to do with it: this is the project's only compiled module.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

DEFAULT_PATTERN: str
"""The split pattern used when none is given: GPT-4's with numbers in groups of at most two digits."""

def skinny_matmul() -> object | None:
    """The custom call `skinny_matmul` as a capsule for `jax.ffi.register_ffi_target(..., platform="cpu")`.

    It multiplies float32 x (m, k) with w (k, n) for m up to 64. None where the processor has no AVX2.
    """

def skinny_rows() -> int:
    """Up to how many rows `skinny_matmul` takes here: 64, or 0 on a processor without AVX2."""

def decode_attention() -> object | None:
    """The custom call `decode_attention`: one token per row against its own valid keys and values, all float32.

    Arguments q (n, H, D), old keys and values (N, S, D) and int32 places (b,) in them, new keys and values (n, R, D),
    int32 start (b,), filled (), window () (negative: none); result (n, H, D). None where the processor has no AVX2.
    """

def keep_largest() -> object | None:
    """The custom call `keep_largest`: float32 x (b, n) with all but the k (b,) int32 largest of each row at -infinity.

    Where equals compete the first ones stay. None where the processor has no AVX2.
    """

class Tokenizer:
    """A byte-level BPE vocabulary with its split pattern. A new one has the 256 single bytes and `DEFAULT_PATTERN`.

    Methods may be called from several threads; the interpreter lock is free while they work. In a `str`, lone
    surrogates (which have no UTF-8) are read as U+FFFD, as tiktoken does.
    """

    def __init__(self) -> None: ...
    @staticmethod
    def from_ranks(ranks: Iterable[tuple[bytes, int]], pattern: str) -> Tokenizer:
        """A tokenizer for given ranks (tiktoken's `mergeable_ranks`, as pairs) and a split pattern (fancy-regex).

        Ranks need not be contiguous. Raises ValueError when one of the 256 single bytes is missing, bytes or ranks
        repeat, a rank is negative or 2**24 or more, or the pattern is no regular expression.
        """

    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        progress: Callable[[str, int, int], object] | None = None,
    ) -> None:
        """Learns merges from a stream of texts and replaces this tokenizer's vocabulary and pattern.

        Exact greedy BPE: each step merges the pair with the largest count over all pieces of the texts (64-bit,
        overlapping pairs count), among equals the smallest (left id, right id). Pieces are what `pattern` (default
        `DEFAULT_PATTERN`) matches; other text is dropped. With too little text the vocabulary is smaller than
        `vocab_size` (which counts the 256 bytes).

        At most `buffer_size` texts, or about a megabyte, are handed to the counting threads at a time; memory depends
        on the number of different pieces, not on the length of the stream. `progress(stage, done, total)` is called
        about ten times a second: ("count", texts read, 0) and then ("merge", merges done, merges asked for).

        Raises ValueError (vocab_size below 256, buffer_size below 1, bad pattern), TypeError (an item that is no str,
        with its index), and whatever the iterator or `progress` raises. The tokenizer is unchanged then.
        """

    def get_pattern(self) -> str:
        """The split pattern."""

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """All tokens as (bytes, id), ascending by id; after training the single bytes, then the merges in order."""

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, the same as tiktoken's `encode_ordinary` with these ranks and this pattern."""

    def batch_encode(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` for each text, on all cores. Raises TypeError for an item that is no str, with its index."""

    def encode_to_numpy(
        self,
        texts: Iterable[str],
        bos: int | None = None,
        dtype: Literal["uint16", "uint32"] | type[np.uint16] | type[np.uint32] = "uint16",
        num_threads: int = 0,
    ) -> tuple[NDArray[np.uint16] | NDArray[np.uint32], NDArray[np.int64]]:
        """The ids of all texts in one array, and where each text begins in it.

        Returns `tokens`, 1-D of `dtype`, and `offsets`, int64 of `len(texts) + 1`: text i is
        `tokens[offsets[i]:offsets[i + 1]]`. With `bos` every text is preceded by that id. `num_threads` 0 means one
        for each core. What short pieces encode to is remembered between calls, up to 16 MB a thread.

        Raises ValueError for another dtype, and for a vocabulary or a `bos` that does not fit it; TypeError for an item
        that is no str, with its index.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD. Raises ValueError for an unknown id."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of some ids. Raises ValueError for an unknown id."""
