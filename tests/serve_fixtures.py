"""A server on a free port of this machine, in a thread, with a tiny model or one that follows a script."""

import contextlib
import functools
import socket
import threading
import time
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai

from nanochat_jax import conversation, gpt
from nanochat_jax.engine import Engine
from nanochat_jax.serve.app import create_app
from nanochat_jax.serve.main import make_server
from nanochat_jax.serve.service import Defaults, Service
from nanochat_jax.serve.worker import ServedModel, Worker
from tests.tokenizer_fixtures import golden_tokenizer

CHAT = ServedModel("tiny", "sft", 7, 1_700_000_000, True)
BASE = ServedModel("tiny", "base", 7, 1_700_000_000, False)
HI = [{"role": "user", "content": "Hello"}]


def _config(tokenizer) -> gpt.GPTConfig:
    return gpt.GPTConfig(
        sequence_len=256, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=8,
        compute_dtype="float32",
    )  # fmt: skip


class Chain:
    """A model that looks at the last token only. It compiles in no time, which a test of a server is thankful for."""

    @staticmethod
    @functools.cache
    def params(seed=0):
        vocab = golden_tokenizer().vocab_size
        table = 2.0 * np.random.default_rng(seed).standard_normal((vocab, vocab), np.float32)
        table[:, list(golden_tokenizer().special_tokens.values())] -= 5.0  # answers that rarely end
        return {"table": jnp.asarray(table)}

    @staticmethod
    def forward_cached(config, params, ids, cache):
        return params["table"][ids], cache

    @staticmethod
    def unembed(config, params, hidden):
        return hidden


def tiny_engine(slots: int = 4, **options) -> Engine:
    tokenizer = golden_tokenizer()
    settings: dict[str, Any] = {"slots": slots, "steps_per_call": 4, "model": Chain, **options}
    return Engine(_config(tokenizer), Chain.params(), tokenizer, **settings)


class Script:
    """A model that says what it is told, the same to everyone whose prompt is `first` + 1 tokens long."""

    @staticmethod
    def params(tokens=(), first=0):
        table = np.full(256, golden_tokenizer().encode_special(conversation.ASSISTANT_END), np.int32)
        table[: len(tokens)] = tokens
        return {"table": jnp.asarray(table), "first": jnp.asarray(first, jnp.int32)}

    @staticmethod
    def forward_cached(config, params, ids, cache):
        rows, T = ids.shape
        if T > 1:  # a prefill chunk: nothing is sampled from it
            return jnp.zeros((rows, T, config.vocab_size)), cache
        wanted = params["table"][jnp.maximum(cache.position - params["first"], 0)]
        return jax.nn.one_hot(wanted, config.vocab_size)[:, None], cache

    @staticmethod
    def unembed(config, params, hidden):
        return hidden * 1e4


def scripted_engine(slots: int = 4, tokenizer=None, **options) -> Engine:
    tokenizer = tokenizer or golden_tokenizer()
    return Engine(
        _config(tokenizer), Script.params(), tokenizer, slots=slots, steps_per_call=4, model=Script, **options
    )


class Running:
    """A server that runs. tell: make a scripted model say these tokens to `messages` or to a prompt of `n` tokens."""

    def __init__(self, service: Service, app, server, port: int):
        self.service, self.worker, self.app, self.server, self.port = service, service.worker, app, server, port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def post(self, path: str, **body) -> httpx.Response:
        return self.http.post(path, json=body)

    def tell(self, tokens, messages=None, n: int | None = None) -> None:
        from nanochat_jax.answers import chat_prompt

        if n is None:
            n = len(chat_prompt(messages or HI, self.service.tokenizer))
        self.worker.replace(Script.params(tokens, n - 1), self.worker.model)
        self.until(lambda: not self.worker.swapping)

    def until(self, condition, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)

    def idle(self) -> None:
        """Waits until nothing runs, and checks that nothing is left behind."""
        self.until(lambda: self.worker.engine.live == 0 and not self.worker._jobs)
        self.until(lambda: not self.worker.engine._table.busy)


@contextlib.contextmanager
def serving(
    engine: Engine, model: ServedModel = CHAT, queue: int = 64, key=None, origin=None, defaults=None, **options
):
    """A `Running` server; stopped at the end, which must be clean."""
    worker = Worker(engine, model, queue)
    service = Service(worker, engine.tokenizer, defaults or Defaults(), **options)  # type: ignore[arg-type]
    app = create_app(service, key, origin)
    server = make_server(app, worker)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    running = Running(service, app, server, listener.getsockname()[1])
    try:
        running.until(lambda: server.started)
        yield running
    finally:
        running.http.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
