"""Serves a trained model: a chat page, an OpenAI-compatible API, /metrics.

python -m scripts.serve                       the newest run, at http://127.0.0.1:8000
python -m scripts.serve --stage=base --watch  follow a run while it trains
"""

import asyncio
import functools
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.serve.security import is_loopback
from nanochat_jax.utils import errors, flags
from nanochat_jax.utils.errors import InputError, UserError
from nanochat_jax.utils.flags import flag

API_KEY_VARIABLE = "NANOCHAT_API_KEY"
GRACE_S = 2.0  # what a stream that runs at shutdown gets to end by itself


@dataclass(frozen=True)
class ServeSettings:
    """The flags of scripts.serve; sampling defaults as the reference's."""

    run: str | None = flag(None, "the run to serve; default: the newest")
    model_tag: str | None = flag(None, "another name for --run", short="g")
    stage: str | None = flag(None, "the newest run of this stage (base, mid, sft, rl)", short="i")
    step: int | None = flag(None, "a checkpoint's step; default: the run's newest", short="s")
    watch: bool = flag(False, "follow the run: serve its newest checkpoint as training saves it")
    host: str = flag("127.0.0.1", "the address to listen on; any but this machine's own needs an API key")
    port: int = flag(8000, "the port to listen on, 0 = any free one", short="p")
    api_key: str | None = flag(
        None,
        "what clients must send as 'Authorization: Bearer KEY'; default: the environment's NANOCHAT_API_KEY, which "
        "the list of processes does not show, as it does flags",
    )
    allow_origin: str | None = flag(None, "a web site (https://example.org) whose pages may call this server")
    slots: int = flag(8, "completions generated at once; more wait")
    queue: int = flag(64, "requests that may wait; more are told to come back (429)")
    temperature: float = flag(0.8, "where a request does not say: 0 = always the most likely token", short="t")
    top_k: int = flag(50, "where a request does not say: sample among the k most likely tokens, 0 = all", short="k")
    max_tokens: int = flag(512, "where a request does not say: the most tokens to generate", short="m")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "gpu"))
    warm_up: bool = flag(True, "compile everything before the first request is answered")
    strict: bool = flag(
        False, "refuse requests with fields that this server knows nothing of, instead of ignoring them"
    )
    log_prompts: bool = flag(False, "write what people ask and are answered to the log")

    def __post_init__(self):
        for problem in _problems(self):
            raise InputError(problem)

    def sampling(self) -> SamplingParams:
        """What a request gets where it does not say. Raises ValueError, naming the field."""
        return SamplingParams(self.max_tokens, self.temperature, self.top_k)


def _problems(s: ServeSettings):
    if s.run and s.model_tag and s.run != s.model_tag:
        yield f"--run={s.run} and --model_tag={s.model_tag} are two names for one thing: give one"
    if s.watch and s.step is not None:
        yield f"--watch follows the newest checkpoint, --step={s.step} asks for another: give one"
    if not 0 <= s.port <= 65535:
        yield f"--port must be between 0 and 65535, got {s.port}"
    if s.slots < 1:
        yield f"--slots must be at least 1, got {s.slots}"
    if s.queue < 0:
        yield f"--queue must be at least 0, got {s.queue}"
    if s.temperature > 2:
        yield f"--temperature must be at most 2, as requests' must be, got {s.temperature:g}"
    try:
        s.sampling()
    except ValueError as error:
        yield f"--{error}"
    if s.api_key is not None and not _is_key(s.api_key):
        yield "--api_key must be ASCII without spaces"


def _is_key(text: str) -> bool:
    return text.isascii() and text.isprintable() and bool(text) and " " not in text


def _given_key(settings: ServeSettings) -> str | None:
    """The key of the flag, or of the environment. Exits with status 2 where the environment's cannot be one."""
    key = settings.api_key or os.environ.get(API_KEY_VARIABLE) or None
    if key is not None and not _is_key(key):
        flags.fail(f"{API_KEY_VARIABLE} must be ASCII without spaces")
    return key


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status (0 stopped as asked, 1 cannot serve, 2 bad flags, 130 stopped before
    it could serve)."""
    settings = flags.parse(ServeSettings, argv, __doc__ or "", echo=False)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("nanochat_jax").setLevel(logging.INFO)
    return errors.exit_status(lambda: _serve(settings))


def _serve(settings: ServeSettings) -> int:
    listener = _listen(settings.host, settings.port)  # a port in use is found out before the model is loaded
    key = given = _given_key(settings)
    if key is None and not is_loopback(settings.host):
        key = secrets.token_urlsafe(24)
    import jax  # takes a second

    from nanochat_jax.hardware import devices
    from nanochat_jax.inference.engine import Engine
    from nanochat_jax.runs.checkpoint import chosen, find_run, load_model
    from nanochat_jax.serve.app import create_app
    from nanochat_jax.serve.watch import Watcher, saved_at
    from nanochat_jax.serve.worker import ServedModel, Worker
    from nanochat_jax.text.chat_format import ASSISTANT_START

    devices.prepare(settings.device)
    print(devices.check(settings.device), flush=True)
    run = find_run(settings.run or settings.model_tag, settings.stage)
    config, params, tokenizer, meta = load_model(run.name, step=settings.step)
    chats = meta["stage"] != "base" and ASSISTANT_START in tokenizer.special_tokens
    model = ServedModel(run.name, meta["stage"], meta["step"], saved_at(run, meta["step"]), chats)
    engine = Engine(config, params, tokenizer, slots=settings.slots, devices=jax.devices())
    kinds = [device.device_kind for device in jax.devices()]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    ready = f"Server ready at {address} (chat page) and {address}/v1 (OpenAI API). Ctrl-C stops it."
    warm_up = functools.partial(_warm_up, engine, ready) if settings.warm_up else None
    worker = Worker(engine, model, settings.queue, kinds, settings.sampling(), settings.log_prompts, warm_up)
    app = create_app(worker, key, settings.allow_origin, settings.strict)
    watcher = Watcher(worker, run, meta) if settings.watch else None

    kind = "chat" if chats else "base model: completions only"
    shown, others = chosen(meta, settings.run or settings.model_tag, settings.stage)
    print(f"{shown} ({kind}), {engine.slots} slots of {engine.capacity}" + (f"; {others}" if others else ""))
    if key is not None and given is None:
        print(f"API key (made for this start; {API_KEY_VARIABLE} in the environment keeps one): {key}")
    print(f"Compiling; {address} takes requests already." if settings.warm_up else ready, flush=True)
    if watcher is not None:
        watcher.start()
    run_app(app, worker, listener)
    if watcher is not None:
        watcher.stop()
    if worker.warmed_up < 1:
        raise worker.failure or KeyboardInterrupt
    print("Server stopped.")
    return 0 if worker.failure is None else 1


def _warm_up(engine, ready: str, told: Callable[[int, int], None]) -> None:
    """Compiles all programs, with progress for the terminal and `told`; then says that the server is ready."""
    from nanochat_jax.utils.progress import ShareProgress

    with ShareProgress("compiling") as progress:

        def both(done: int, total: int) -> None:
            told(done, total)
            progress(f"{done}/{total} programs", done / total)

        engine.warm_up(both)
    print(ready, flush=True)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host} port {port} ({why}): choose another --host or --port") from None


def run_app(app, worker, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM (a second SIGINT does not wait), or until the server's `should_exit` is set."""
    server = make_server(app, worker)
    worker.on_failed_start = functools.partial(setattr, server, "should_exit", True)
    server.run(sockets=[listener])


def make_server(app, worker):
    """A uvicorn server whose shutdown ends open streams: they get GRACE_S to finish, then a last event that says so."""
    import uvicorn

    from nanochat_jax.serve.api_errors import ShuttingDown

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # as uvicorn's, but the signal is not raised again after a clean end: stopping as asked is status 0
            if self.should_exit and sig == signal.SIGINT:
                self.force_exit = True
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            worker.drain()
            timer = asyncio.get_running_loop().call_later(GRACE_S, worker.end_all, ShuttingDown())
            await super().shutdown(sockets)
            timer.cancel()

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        http="h11",  # whatever else is installed: this one has a limit on headers
        ws="none",
        server_header=False,
        proxy_headers=False,  # nothing here believes them
        lifespan="on",
        timeout_graceful_shutdown=int(GRACE_S) + 3,
        h11_max_incomplete_event_size=1 << 16,
    )
    return Server(config)
