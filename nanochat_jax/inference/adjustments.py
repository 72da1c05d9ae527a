"""What a request changes about its logits before a token is drawn: biases, penalties, a grammar's mask. No JAX here.

Only calls with such a row pay for it. There is nothing on the device between two calls: for each call the host makes
two arrays of (rows, V), the biases and how often each token has occurred (8 bytes a row and token of the vocabulary);
what a call itself generates is counted there by the compiled loop (`logits`). Calls without such a row run the same
program and are given zeros that stay on the device.
"""

from collections.abc import Sequence

import numpy as np

from nanochat_jax.inference.request import Request

IN_PROMPT, GENERATED = 1, 2  # `seen` of a token: 1 if the prompt has it, and 2 for each time that it was generated


class Adjustments:
    """Of one running request."""

    def __init__(self, request: Request, vocab_size: int):
        params = request.params
        self._counts = params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
        self._seen = np.zeros(vocab_size, np.int32)
        self._seen[np.array(request.prompt)] = IN_PROMPT
        self._bias = np.zeros(vocab_size, np.float32)
        for token, bias in params.logit_bias:
            self._bias[token] = bias
        self._counted = 0
        self._grammar = request.grammar

    def fill(self, tokens: Sequence[int], bias: np.ndarray, seen: np.ndarray) -> None:
        """Writes the request's rows (V,) of both arrays, after the `tokens` that it has generated so far."""
        bias[:] = self._bias
        if self._grammar is not None:
            bias[~self._grammar.allowed()] = -np.inf
        if self._counts:
            np.add.at(self._seen, tokens[self._counted :], GENERATED)
            self._counted = len(tokens)
            seen[:] = self._seen
