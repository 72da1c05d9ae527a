"""Log-probabilities of tokens as OpenAI's two kinds of completion write them.

Every generated token has an entry, those of the calculator and the end token too, as many as `usage` counts: what is
special is named by its name. A token that is no valid UTF-8 by itself is called ``bytes:\\xf0\\x9f``, so that names are
unique; ``bytes`` has what it stands for.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_jax.inference.request import Request
from nanochat_jax.text.tokenizer import Tokenizer

Alternatives = list[tuple[int, float]]


@dataclass
class KnownTokens:
    """Tokens with their log-probabilities and the most likely alternatives of each; None: a first token, before which
    there is nothing."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)

    def add(
        self, tokens: Sequence[int], logprobs: Sequence[float | None], alternatives: Sequence[Alternatives]
    ) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        self.alternatives += alternatives


class Echo:
    """A prompt that is part of the answer. text: as the client wrote it, without the bos that the server put before."""

    def __init__(self, request: Request, text: str, implicit: int):
        self.text = text
        self._request, self._implicit = request, implicit

    def known(self) -> KnownTokens:
        """The prompt's tokens, those that the client gave."""
        r, n = self._request, self._implicit
        return KnownTokens(r.prompt[n:], [None, *r.prompt_logprobs][n:], [[], *r.prompt_alternatives][n:])


class TokenNames:
    """token id -> (name, bytes), remembered."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._known = tokenizer, dict[int, tuple[str, list[int]]]()

    def __getitem__(self, token: int) -> tuple[str, list[int]]:
        if token not in self._known:
            raw = self._tokenizer.decode_bytes([token])
            try:
                name = raw.decode()
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._known[token] = name, list(raw)
        return self._known[token]

    def of_special(self, token: int) -> bool:
        return token >= len(self._tokenizer.ranks)


class ChatLogprobs:
    """`choices[].logprobs` of a chat completion, whole or of one chunk after the other."""

    def __init__(self, names: TokenNames):
        self._names = names

    def write(self, known: KnownTokens) -> dict[str, Any]:
        each = zip(known.tokens, known.logprobs, known.alternatives, strict=True)
        content = [
            {**self._entry(token, chance), "top_logprobs": [self._entry(*other) for other in others]}
            for token, chance, others in each
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, chance: float | None) -> dict[str, Any]:
        name, raw = self._names[token]
        return {"token": name, "logprob": chance, "bytes": raw}


class TextLogprobs:
    """`choices[].logprobs` of a text completion. The chosen token is among the alternatives, in addition to them if
    need be."""

    def __init__(self, names: TokenNames):
        self._names, self._offset = names, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, known: KnownTokens) -> dict[str, Any]:
        names = self._names
        tops = []
        for token, chance, others in zip(known.tokens, known.logprobs, known.alternatives, strict=True):
            top = {names[other][0]: p for other, p in others}
            tops.append(None if chance is None else {**top, names[token][0]: chance})
        return {
            "tokens": [names[token][0] for token in known.tokens],
            "token_logprobs": known.logprobs,
            "top_logprobs": tops,
            "text_offset": [self._place(token) for token in known.tokens],
        }

    def _place(self, token: int) -> int:
        """Where in the text a token begins; special tokens are not in it."""
        place = self._offset
        if not self._names.of_special(token):
            self._offset += len(self._decoder.decode(bytes(self._names[token][1])))
        return place
