"""The tokenizer: byte-level BPE, training and encoding by ``rustbpe``, saved as JSON. No JAX here.

Ids are 0..255 for the single bytes, then the merges in the order they were trained, then the nine special tokens.
Special strings inside ordinary text are never recognised: they are encoded as the plain text they are.

tiktoken gives the same ids and stands in where ``rustbpe`` is not built. Its splitter gives up on a million characters
of white space with a Rust panic (a BaseException), and one long word takes it minutes: so there is one encoder for all
text.
"""

import base64
import codecs
import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np
import tiktoken
import tiktoken.load

from nanochat_jax.text import chat_format as rendering
from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.paths import OFFLINE_VARIABLE, offline, tokenizer_dir, write_atomic

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = [
    rendering.BOS,  # starts every document
    rendering.USER_START,
    rendering.USER_END,
    rendering.ASSISTANT_START,
    rendering.ASSISTANT_END,
    rendering.PYTHON_START,  # the assistant calls the calculator ...
    rendering.PYTHON_END,
    rendering.OUTPUT_START,  # ... and its answer is put into the sequence
    rendering.OUTPUT_END,
]

# GPT-4's split, with runs of digits cut in twos, not threes: a small vocabulary cannot hold a thousand numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

FILE_NAME = "tokenizer.json"
FILE_FORMAT, FILE_VERSION = "nanochat_jax.tokenizer", 1
HOW_TO_TRAIN = "train one: python -m scripts.tok_train --data PATH (or --demo)"


class TokenizerError(UserError, ValueError):
    """A tokenizer file that cannot be used; the message names the file and the remedy."""


class EncodingUnavailable(UserError, ConnectionError):
    """A stock encoding that is neither in tiktoken's cache nor reachable."""


@contextlib.contextmanager
def _no_socket_if_offline() -> Iterator[None]:
    """In offline mode tiktoken finds its stock encodings in its cache or not at all."""
    original = tiktoken.load.read_file

    def read_file(blobpath: str) -> bytes:
        if offline() and "://" in blobpath:
            raise ConnectionError(f"{OFFLINE_VARIABLE} is set")
        return original(blobpath)

    tiktoken.load.read_file = read_file
    try:
        yield
    finally:
        tiktoken.load.read_file = original


def _raise(error: BaseException) -> NoReturn:
    """Raises on, or as a TokenizerError what a regex engine cannot split: a ValueError of `rustbpe`, a panic of
    tiktoken."""
    if isinstance(error, ValueError) and "split pattern" in str(error):
        raise TokenizerError(f"{error}: cut the text, or use a tokenizer of this project") from error
    if type(error).__name__ == "PanicException":
        raise TokenizerError("a text is too long for tiktoken's splitter: cut it, or build rustbpe") from error
    raise error


class Tokenizer:
    """Text to ids and back. Build one with ``train``, ``load`` or ``from_tiktoken``."""

    def __init__(
        self,
        ranks: Sequence[bytes],
        special_tokens: dict[str, int],
        pattern: str = SPLIT_PATTERN,
        bos: str = rendering.BOS,
        training: dict[str, Any] | None = None,
    ):
        """``ranks[i]`` holds the bytes of token i; special ids follow the ranks. ``training`` is a summary to keep."""
        self.ranks = [bytes(token) for token in ranks]
        mergeable = {token: rank for rank, token in enumerate(self.ranks)}
        if len(mergeable) != len(self.ranks):
            raise TokenizerError(f"{len(self.ranks) - len(mergeable)} tokens have the same bytes as another token")
        if special_tokens and min(special_tokens.values()) < len(self.ranks):
            raise TokenizerError("a special token's id lies among the ordinary tokens")
        if bos not in special_tokens:
            raise TokenizerError(f"{bos} is not among the special tokens {sorted(special_tokens)}")
        self.pattern = pattern
        self.special_tokens = dict(special_tokens)
        self.training = dict(training or {})
        self._bos_name = bos
        self._encoding = tiktoken.Encoding(
            "nanochat_jax", pat_str=pattern, mergeable_ranks=mergeable, special_tokens=self.special_tokens
        )

    # --- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        iterator: Iterable[str],
        vocab_size: int,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> "Tokenizer":
        """Learn merges from texts. ``vocab_size`` includes the special tokens; ``progress(stage, done, total)``.

        Text with too few distinct pairs gives a smaller vocabulary: ``tokenizer.training["warning"]`` and the log name
        both sizes. Raises AssertionError when ``vocab_size`` is less than the bytes and the special tokens.
        """
        import rustbpe

        n_ranks = vocab_size - len(SPECIAL_TOKENS)
        if n_ranks < 256:
            raise AssertionError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need "
                f"{256 + len(SPECIAL_TOKENS)}"
            )
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(iterator), n_ranks, pattern=SPLIT_PATTERN, progress=progress)
        pairs = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        ranks = [bytes(token) for token, _ in pairs]
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        training: dict[str, Any] = {"requested_vocab_size": vocab_size, "vocab_size": len(ranks) + len(special)}
        if len(ranks) < n_ranks:
            training["warning"] = (
                f"the text supports a vocabulary of {training['vocab_size']} tokens only, not the {vocab_size} asked "
                "for; give more text (or lower --vocab_size)"
            )
            logger.warning("%s", training["warning"])
        return cls(ranks, special, training=training)

    def save(self, directory: str | Path | None = None) -> Path:
        """Write ``tokenizer.json`` into ``directory`` (default: the base directory's); returns its path."""
        path = Path(directory if directory is not None else tokenizer_dir()) / FILE_NAME
        content = {
            "format": FILE_FORMAT,
            "version": FILE_VERSION,
            "hash": self.hash,
            "pattern": self.pattern,
            "bos": self._bos_name,
            "special_tokens": self.special_tokens,
            "training": self.training,
            "ranks": [base64.b64encode(token).decode("ascii") for token in self.ranks],
        }
        write_atomic(path, json.dumps(content, ensure_ascii=True, indent=0) + "\n")
        return path

    @classmethod
    def load(cls, directory: str | Path | None = None) -> "Tokenizer":
        """Read ``tokenizer.json`` from ``directory`` (default: the base directory's) and verify its hash.

        Raises FileNotFoundError (saying how to train one) when it is missing, TokenizerError when it is damaged.
        """
        path = Path(directory if directory is not None else tokenizer_dir()) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"there is no tokenizer at {path}; {HOW_TO_TRAIN}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind = (content["format"], content["version"])
            if kind != (FILE_FORMAT, FILE_VERSION):
                raise TokenizerError(f"{path} has format {kind}, this program reads {(FILE_FORMAT, FILE_VERSION)}")
            ranks = [base64.b64decode(token, validate=True) for token in content["ranks"]]
            tokenizer = cls(ranks, content["special_tokens"], content["pattern"], content["bos"], content["training"])
            recorded = content["hash"]
        except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, TokenizerError) and str(path) in str(error):
                raise
            raise TokenizerError(f"{path} is damaged ({type(error).__name__}: {error}); {HOW_TO_TRAIN}") from error
        if tokenizer.hash != recorded:
            raise TokenizerError(
                f"{path} is damaged: its contents have hash {tokenizer.hash[:12]}, it says {recorded[:12]}; "
                f"{HOW_TO_TRAIN}"
            )
        return tokenizer

    @classmethod
    def from_tiktoken(cls, name: str) -> "Tokenizer":
        """A stock tiktoken encoding such as ``gpt2`` or ``cl100k_base``, with ``<|endoftext|>`` as bos.

        Raises TokenizerError for an unknown name and ConnectionError when the encoding is neither in tiktoken's cache
        nor reachable (or ``NANOCHAT_OFFLINE`` is set).
        """
        if name not in tiktoken.list_encoding_names():
            raise TokenizerError(f"tiktoken knows no encoding {name!r}; try gpt2 or cl100k_base")
        try:
            with _no_socket_if_offline():
                encoding = tiktoken.get_encoding(name)
        except OSError as error:
            raise EncodingUnavailable(
                f"the encoding {name} is not in tiktoken's cache and cannot be downloaded ({error}); load it once with "
                "a network, or point TIKTOKEN_CACHE_DIR to a copy of the cache"
            ) from error
        ranks = sorted(encoding._mergeable_ranks.items(), key=lambda pair: pair[1])
        if [rank for _, rank in ranks] != list(range(len(ranks))):
            raise TokenizerError(f"the encoding {name} has gaps in its ids and cannot be used here")
        special = dict(encoding._special_tokens)
        return cls([token for token, _ in ranks], special, encoding._pat_str, bos="<|endoftext|>")

    # --- facts ------------------------------------------------------------------------------------------------------

    @cached_property
    def hash(self) -> str:
        """SHA-256 over everything that decides ids: pattern, bytes of every token, special tokens, bos."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.pattern, self.special_tokens, self._bos_name], sort_keys=True).encode())
        for token in self.ranks:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    @property
    def vocab_size(self) -> int:
        """Largest id plus one, special tokens included."""
        return self._encoding.n_vocab

    @property
    def bos_id(self) -> int:
        """Id of the token that starts every document."""
        return self.special_tokens[self._bos_name]

    def token_bytes(self, v1_compat: bool = False) -> np.ndarray:
        """int32 (vocab_size,): how many bytes of text each token stands for, 0 for special tokens.

        Bits per byte divides by these. The reference's v1 measured the *decoded string*, so that a token which is no
        valid UTF-8 by itself counts three bytes for each U+FFFD; ``v1_compat`` reproduces that for comparisons.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for i, token in enumerate(self.ranks):
            lengths[i] = len(token.decode("utf-8", "replace").encode()) if v1_compat else len(token)
        if v1_compat:  # the reference compares strings: an ordinary token spelled like a special one counts 0 too
            for i, token in enumerate(self.ranks):
                if token.decode("utf-8", "replace") in self.special_tokens:
                    lengths[i] = 0
        return lengths

    # --- text to ids ------------------------------------------------------------------------------------------------

    @overload
    def encode(
        self, text: str, prepend: int | str | None = None, append: int | str | None = None, num_threads: int = 8
    ) -> list[int]: ...

    @overload
    def encode(
        self, text: list[str], prepend: int | str | None = None, append: int | str | None = None, num_threads: int = 8
    ) -> list[list[int]]: ...

    def encode(
        self,
        text: str | list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """Ids of a text, or a list of ids for a list of texts (in ``num_threads`` threads).

        ``prepend`` and ``append`` are ids or names of special tokens, put around every text. Raises ValueError for any
        other type, KeyError for an unknown special token, otherwise as ``encode_text``.
        """
        if not isinstance(text, str | list):
            raise ValueError(f"encode takes a str or a list of str, not {type(text)}")
        before = [] if prepend is None else [self._as_id(prepend)]
        after = [] if append is None else [self._as_id(append)]
        if isinstance(text, str):
            return before + self.encode_text(text) + after
        try:
            return [before + ids + after for ids in self._encode_batch(text, num_threads)]
        except BaseException as error:
            _raise(error)

    def encode_text(self, text: str) -> list[int]:
        """Ids of one text, nothing around it. Raises TokenizerError for a text that the split pattern of a foreign
        tokenizer cannot handle."""
        try:
            return self._encode_one(text)
        except BaseException as error:
            _raise(error)

    def encode_to_numpy(self, texts: list[str], num_threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """All texts in one 1-D array, bos before each, and int64 offsets (len(texts) + 1); ids equal ``encode``'s.

        uint16 where the vocabulary fits, uint32 above 65,536. Threaded in Rust without the GIL; 0 = all cores.
        """
        dtype = "uint16" if self.vocab_size <= 65536 else "uint32"
        try:
            return self._encoder.encode_to_numpy(texts, bos=self.bos_id, dtype=dtype, num_threads=num_threads)
        except ValueError as error:
            _raise(error)

    @cached_property
    def _encoder(self) -> Any:
        import rustbpe

        return rustbpe.Tokenizer.from_ranks([(token, i) for i, token in enumerate(self.ranks)], self.pattern)

    @cached_property
    def _encode_one(self) -> Callable[[str], list[int]]:
        try:
            return self._encoder.encode
        except ModuleNotFoundError:
            return self._encoding.encode_ordinary

    def _encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        try:
            ids, ends = self._encoder.encode_to_numpy(texts, dtype="uint32", num_threads=num_threads)
        except ModuleNotFoundError:
            return self._encoding.encode_ordinary_batch(texts, num_threads=num_threads)
        return [ids[a:b].tolist() for a, b in itertools.pairwise(ends.tolist())]

    def encode_special(self, name: str) -> int:
        """Id of exactly one token given by its text, special or ordinary (looked up, not split). Raises KeyError."""
        special = self.special_tokens.get(name)
        return special if special is not None else self._encoding.encode_single_token(name)

    def _as_id(self, token: int | str) -> int:
        return token if isinstance(token, int) else self.encode_special(token)

    # --- ids to text ------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no valid UTF-8 become U+FFFD. Raises KeyError for an id beyond the vocabulary."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ids, special tokens as their names."""
        return self._encoding.decode_bytes(ids)

    # --- conversations (see conversation.py) --------------------------------------------------------------------------

    def render_conversation(
        self, conversation: dict[str, Any], max_tokens: int = rendering.DEFAULT_MAX_TOKENS
    ) -> tuple[list[int], list[int]]:
        """Ids and loss mask of a conversation."""
        return rendering.render_conversation(conversation, self.encode_text, self.encode_special, max_tokens)

    def render_for_completion(
        self, conversation: dict[str, Any], max_tokens: int = rendering.DEFAULT_MAX_TOKENS
    ) -> list[int]:
        """Ids that prime the assistant to write the conversation's last message."""
        return rendering.render_for_completion(conversation, self.encode_text, self.encode_special, max_tokens)

    def visualize_tokenization(self, ids: Sequence[int], mask: Sequence[int], with_token_id: bool = False) -> str:
        """Coloured tokens, green where the mask is 1."""
        return rendering.visualize_tokenization(ids, mask, self.decode, with_token_id)

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder to feed ids as they come."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns ids into text as they come, holding back the bytes of an unfinished character.

    Text from ``push`` and the final ``flush`` joins to exactly ``decode`` of all ids; at most three bytes wait, so the
    cost per token does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *tokens: int) -> str:
        """The text that these ids complete ("" while a character is unfinished)."""
        return self._decoder.decode(self._tokenizer.decode_bytes(tokens))

    def flush(self) -> str:
        """The end: U+FFFD if a character was left unfinished, else ""."""
        return self._decoder.decode(b"", final=True)
