"""A server on a free port of this machine, in a thread, with a tiny model or one that follows a script."""

import contextlib
import functools
import socket
import threading
import time
from typing import Any

import httpx
import jax.numpy as jnp
import numpy as np
import openai

from nanochat_jax.inference.engine import Engine
from nanochat_jax.model import gpt
from nanochat_jax.serve.app import create_app
from nanochat_jax.serve.main import make_server
from nanochat_jax.serve.worker import ServedModel, Worker
from nanochat_jax.text import chat_format
from tests.fakes import FakeModel, fake_params
from tests.tokenizer_fixtures import golden_tokenizer

CHAT = ServedModel("tiny", "sft", 7, 1_700_000_000, True)
BASE = ServedModel("tiny", "base", 7, 1_700_000_000, False)
CAPACITY = 128
HI: Any = [{"role": "user", "content": "Hello"}]


@functools.cache
def _table(seed: int):
    table = 2.0 * np.random.default_rng(seed).standard_normal((64, golden_tokenizer().vocab_size), np.float32)
    table[:, list(golden_tokenizer().special_tokens.values())] -= 5.0  # completions that rarely end
    return table


def toy_params(seed: int = 0, script=None, first: int = 0) -> Any:
    """A `FakeModel` that answers at random, or says a script from position `first` on; all of the same shapes."""
    line = np.full(CAPACITY, golden_tokenizer().encode_special(chat_format.ASSISTANT_END), np.int32)
    line[: len(script or ())] = script or ()
    params = fake_params(table=_table(seed), script=line, first=first)
    return {**params, "follows_script": jnp.asarray(script is not None)}


def toy_engine(slots: int = 4, tokenizer=None, pause: float = 0.0, **options) -> Engine:
    """A `FakeModel` that answers at random until it is told what to say (`tell`). pause: seconds before a step."""
    tokenizer = tokenizer or golden_tokenizer()
    config = gpt.GPTConfig(
        sequence_len=CAPACITY, vocab_size=golden_tokenizer().vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=8,
        compute_dtype="float32",
    )  # fmt: skip
    settings: dict[str, Any] = {"slots": slots, "steps_per_call": 4, "model": FakeModel, **options}
    engine = Engine(config, toy_params(), tokenizer, **settings)
    if pause:
        step = engine.step
        engine.step = lambda *arguments: (time.sleep(pause), step(*arguments))[1]
    return engine


class Running:
    """A server that runs. tell: make a scripted model say these tokens to `messages` or to a prompt of `n` tokens."""

    def __init__(self, worker: Worker, app, server, port: int):
        self.worker, self.app, self.server, self.port = worker, app, server, port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def post(self, path: str, **body) -> httpx.Response:
        return self.http.post(path, json=body)

    def tell(self, tokens, messages=None, n: int | None = None) -> None:
        from nanochat_jax.text.prompts import chat_prompt

        if n is None:
            n = len(chat_prompt(messages or HI, self.worker.tokenizer))
        self.worker.replace(toy_params(script=tokens, first=n - 1), self.worker.model)
        self.until(lambda: not self.worker.swapping)

    def until(self, condition, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)

    def idle(self) -> None:
        """Waits until nothing runs, and checks that nothing is left behind."""
        self.until(lambda: self.worker.engine.live == 0 and not self.worker._running)
        self.until(lambda: not self.worker.engine._scheduler.busy)


@contextlib.contextmanager
def serving(
    engine: Engine, model: ServedModel = CHAT, queue: int = 64, key=None, origin=None, strict: bool = False, **options
):
    """A `Running` server; stopped at the end, which must be clean."""
    worker = Worker(engine, model, queue, **options)
    app = create_app(worker, key, origin, strict)
    server = make_server(app, worker)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    running = Running(worker, app, server, listener.getsockname()[1])
    try:
        running.until(lambda: server.started)
        yield running
    finally:
        running.http.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
