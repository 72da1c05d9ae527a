"""Stand-ins for what takes long: a model that compiles in no time, and an engine without a model.

As a program (`python -m tests.fakes`): a terminal chat with an engine that talks back.
"""

import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.inference.request import Request, SamplingParams
from tests.tokenizer_fixtures import golden_tokenizer


class FakeModel:
    """In place of `gpt`, for the engine. Its parameters (`fake_params`) say what it says."""

    @staticmethod
    def forward_cached(config, params, ids, cache):
        table, script = params["table"], params["script"]
        logits = table[ids % table.shape[0]]
        if ids.shape[1] == 1:  # nothing is sampled from a prefill chunk
            at = jnp.clip(cache.position - params["first"], 0, script.shape[1] - 1)
            wanted = script[jnp.arange(ids.shape[0]) % script.shape[0], at]
            scripted = 1e4 * jax.nn.one_hot(wanted, config.vocab_size)[:, None]
            logits = jnp.where(params["follows_script"], scripted, logits)
        return logits, cache

    @staticmethod
    def unembed(config, params, hidden):
        return hidden


def fake_params(*, table=None, script=None, first: int = 0) -> Any:
    """Parameters of a `FakeModel` for the golden tokenizer's vocabulary.

    table (N, V): the logits after each token (modulo N). script (R, L) or (L,): instead, row r of a batch says
    script[r % R][i] at position first + i, and the last of it for ever.
    """
    no_table = np.zeros((1, golden_tokenizer().vocab_size), np.float32)
    return {
        "table": jnp.asarray(no_table if table is None else table),
        "script": jnp.atleast_2d(jnp.asarray(0 if script is None else script, jnp.int32)),
        "first": jnp.int32(first),
        "follows_script": jnp.asarray(script is not None),
    }


def chain_params(following: dict[int, int], otherwise: int) -> Any:
    """A `FakeModel` whose next token depends on the last one only."""
    vocab_size = golden_tokenizer().vocab_size
    table = np.zeros((vocab_size, vocab_size), np.float32)
    for token in range(vocab_size):
        table[token, following.get(token, otherwise)] = 9.0
    return fake_params(table=table)


@dataclass
class FakeEvent:
    tokens: list[int]


class FakeEngine:
    """Answers one request at a time with given tokens, a few per step, and remembers what it was asked."""

    capacity = 64

    def __init__(self, *answers):
        self.answers, self.prompts, self.requests = list(answers), [], []

    def submit(self, prompt: list[int], params: SamplingParams) -> Request:
        assert params.max_tokens is not None
        self.prompts.append(prompt)
        self.request = Request(prompt, params, params.max_tokens, number=0)
        self.requests.append(self.request)
        self.left = list(self.answers.pop(0))[: params.max_tokens]
        self.ended = len(self.left) < params.max_tokens
        return self.request

    def step(self) -> list[FakeEvent]:
        part, self.left = self.left[:2], self.left[2:]
        self.request.tokens += part
        if not self.left:
            self.request.finished = "end" if self.ended else "length"
        return [FakeEvent(part)]

    def cancel(self, request: Request) -> None:
        if request.finished is None:
            request.finished = "cancelled"


class TalkativeEngine(FakeEngine):
    """Says how many characters the question has; to the question "long", goes on until it is stopped."""

    capacity = 10_000

    def submit(self, prompt: list[int], params: SamplingParams) -> Request:
        tokenizer = golden_tokenizer()
        question = tokenizer.decode(prompt).split("<|user_start|>")[-1].split("<|user_end|>")[0]
        self.pause = 0.02 if question == "long" else 0.0
        text = "na " * 400 if question == "long" else f"Echo {len(question) + 1}"
        self.answers.append([*text.encode(), tokenizer.encode_special("<|assistant_end|>")])
        return super().submit(prompt, SamplingParams(max_tokens=10_000))

    def step(self) -> list[FakeEvent]:
        time.sleep(self.pause)
        return super().step()


if __name__ == "__main__":
    from nanochat_jax.terminal.app import talk
    from nanochat_jax.terminal.console import Screen
    from nanochat_jax.terminal.session import Chat, ChatSettings

    talk(
        Chat(TalkativeEngine(), golden_tokenizer(), ChatSettings(), completing=False),
        Screen(sys.stdout, True),
        "scripted",
    )
