"""The engine on a thread of its own, and the bridge between it and asyncio.

One decode thread steps the engine while there is anything to do. The event loop never waits for it: submitting and
cancelling only append to a queue or set a mark, and after every step the thread hands all new tokens to the loop in one
call. If a step fails, every open generation ends with an error, the reason is logged and `healthy` turns false: the
thread never dies in silence. What has to be compiled is compiled on that thread first, while requests wait.
"""

import asyncio
import functools
import json
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import Event, Request, SamplingParams
from nanochat_jax.serve.api_errors import ApiError, QueueFull, ShuttingDown, WorkerFailed
from nanochat_jax.serve.logprobs import Alternatives, TokenNames
from nanochat_jax.serve.prometheus import Metrics
from nanochat_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# A client whose completion has just ended is likely to ask again. No request gets into a call that is running, so the
# next one is this many times shorter than usual: of 32 streams without a pause between their requests, one in eight
# slots stood empty.
SOON = 8
DEFAULTS = SamplingParams(max_tokens=512, temperature=0.8, top_k=50)  # the reference's
STALLED_S = 300.0  # a step that takes longer is a hanging device; without a warm-up steps compile, which takes minutes


@dataclass(frozen=True)
class ServedModel:
    """What is being served: the run's name, its stage ("base", "mid", "sft", "rl"), the checkpoint's step, when it was
    saved (Unix seconds) and whether it holds conversations."""

    name: str
    stage: str
    step: int
    created: int
    chats: bool

    @property
    def fingerprint(self) -> str:
        """Which parameters answered; OpenAI's ``system_fingerprint``."""
        return f"{self.name}-step-{self.step}"


@dataclass(frozen=True)
class Update:
    """New tokens of one of a generation's requests, its finish_reason if it ended, and which model wrote them; their
    log-probabilities and alternatives where the request asks for them."""

    index: int
    tokens: Sequence[int]
    finished: str | None
    model: ServedModel
    logprobs: Sequence[float] = ()
    alternatives: Sequence[Alternatives] = ()


class Generation:
    """The requests of one HTTP call, and their tokens as they come: ``async for update in generation``. Close it when
    done. n: completions of each prompt, which are next to each other."""

    def __init__(self, worker: "Worker", requests: Sequence[Request], n: int):
        self.requests, self.n = list(requests), n
        self.began = time.monotonic()
        self._worker = worker
        self._updates: asyncio.Queue[Update | ApiError] = asyncio.Queue()
        self._open = set(range(len(requests)))
        self._last: list[float | None] = [None] * len(requests)
        self._closed = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt) for request in self.requests[:: self.n])

    @property
    def cached_tokens(self) -> int:
        """How many of them were in the cache."""
        return sum(request.reused for request in self.requests[:: self.n])

    async def __aiter__(self) -> AsyncIterator[Update]:
        """Ends when every request has; raises ApiError if the worker fails or the server stops."""
        while self._open:
            update = await self._updates.get()
            if isinstance(update, ApiError):
                raise update
            if update.index in self._open:
                if update.finished:
                    self._open.discard(update.index)
                yield update

    def close(self) -> None:
        """Ends whatever still runs, and counts the call. Call it however the generation ended."""
        if self._closed:
            return
        self._closed = True
        for index in self._open:
            self._worker.release(self.requests[index])
        self._open.clear()
        self._worker.book(self)

    def end(self, error: ApiError) -> None:
        """Ends the iteration with an error."""
        self._updates.put_nowait(error)

    def receive(self, index: int, update: Update, metrics: Metrics) -> None:
        now, before = time.monotonic(), self._last[index]
        metrics.tokens(len(update.tokens), now - (before or self.began), first=before is None)
        self._last[index] = now
        self._updates.put_nowait(update)


class _Stopped(Exception):
    """The server is stopped while it is warming up."""


class Worker:
    """Owns an engine (it must have a tokenizer).

    queue: how many requests may wait beyond those that have a slot. devices: what the engine runs on, for /stats.
    defaults: sampling where a request does not say. log_prompts: write prompts and completions to the log, which
    nothing else does. warm_up: what the thread does before its first step, such as `Engine.warm_up`; it is
    given what to call with (done, total). Everything but `replace` is to be called on the event loop that `start` was
    called on.
    """

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        queue: int,
        devices: Sequence[str] = ("cpu",),
        defaults: SamplingParams = DEFAULTS,
        log_prompts: bool = False,
        warm_up: Callable[[Callable[[int, int], None]], object] | None = None,
    ):
        assert engine.tokenizer is not None
        self.engine, self.model, self.queue, self.devices = engine, model, queue, list(devices)
        self.tokenizer: Tokenizer = engine.tokenizer
        self.token_names = TokenNames(self.tokenizer)
        self.longest_token = max(len(token) for token in self.tokenizer.ranks)
        self.defaults, self._log_prompts = defaults, log_prompts
        self.metrics = Metrics()
        self.metrics.watch(self)
        self.failure: BaseException | None = None
        self.on_failed_start: Callable[[], None] = lambda: None  # called on the event loop
        self._warm_up, self.warmed_up = warm_up, 1.0 if warm_up is None else 0.0  # how much of it is done
        self._running: dict[Request, tuple[Generation, int]] = {}
        self._seconds = 1.0  # how long a request takes, smoothed
        self._wake, self._stopping, self._draining = threading.Event(), False, False
        self._pending: tuple[Any, ServedModel] | None = None
        self._beat = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)

    # --- state ------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return self.engine.waiting

    @property
    def running(self) -> int:
        """Requests in a slot."""
        return max(0, self.engine.live - self.engine.waiting)

    @property
    def healthy(self) -> bool:
        """False once a step has failed, or while one takes longer than `STALLED_S`."""
        stalled = self.warmed_up == 1 and self.engine.live > 0 and time.monotonic() - self._beat > STALLED_S
        return self.failure is None and self._thread.is_alive() and not stalled

    @property
    def ready(self) -> bool:
        """Whether requests are answered now, and not only taken."""
        return self.healthy and self.warmed_up == 1

    @property
    def swapping(self) -> bool:
        """Whether parameters given to `replace` are not in use yet."""
        return self._pending is not None

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._beat = time.monotonic()
        self._thread.start()

    def drain(self) -> None:
        """From now on nothing new is accepted."""
        self._draining = True

    def end_all(self, error: ApiError) -> None:
        """Ends every open generation with an error."""
        for generation in {id(generation): generation for generation, _ in self._running.values()}.values():
            generation.end(error)

    def stop(self) -> None:
        """Ends everything and the thread; waits for the step that is running, but not for ever."""
        self.drain()
        self.end_all(ShuttingDown())
        for request in list(self._running):
            self.release(request)
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=10)

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, prompts: Sequence[Sequence[int]], n: int, params: SamplingParams) -> Generation:
        """Queues n completions of each prompt, those of one prompt next to each other. max_tokens is lowered to what
        fits the slot.

        Raises QueueFull, WorkerFailed or ShuttingDown; ValueError as `Engine.submit` (a prompt longer than a slot).
        """
        if self._draining:
            raise ShuttingDown()
        if self.failure is not None:
            raise WorkerFailed()
        count = len(prompts) * n
        if len(self._running) + count > self.engine.slots + self.queue:
            self.metrics.refused()
            raise QueueFull(self._retry_after(count))
        requests: list[Request] = []
        try:
            for prompt in prompts:
                longest = max(1, self.engine.capacity - len(prompt) + 1)
                own = replace(params, max_tokens=min(params.max_tokens or longest, longest))
                requests += [self.engine.submit(prompt, replace(own, sample_index=i)) for i in range(n)]
        except ValueError:
            for request in requests:
                self.engine.cancel(request)
            raise
        generation = Generation(self, requests, n)
        for index, request in enumerate(requests):
            self._running[request] = generation, index
        self._wake.set()
        if self._log_prompts:
            for prompt in prompts:
                logger.info("prompt: %s", json.dumps(self.tokenizer.decode(prompt), ensure_ascii=False))
        return generation

    def book(self, generation: Generation) -> None:
        """Counts, and logs if asked to, a generation that is over."""
        self.metrics.prompt(generation.prompt_tokens, generation.cached_tokens)
        if self._log_prompts:
            for request in generation.requests:
                text = json.dumps(request.completion(self.tokenizer).text, ensure_ascii=False)
                logger.info("completion (%s): %s", request.finished, text)

    def release(self, request: Request) -> None:
        """Cancels a request that no client waits for any longer."""
        self._running.pop(request, None)
        self.engine.cancel(request)
        self._wake.set()  # one more step lets go of what its slot refers to

    def _retry_after(self, count: int) -> int:
        turns = (len(self._running) + count - self.engine.slots - self.queue) / self.engine.slots
        return max(1, min(60, math.ceil(turns * self._seconds)))

    def replace(self, params: Any, model: ServedModel) -> None:
        """New parameters, from any thread: in use as soon as no slot is busy; waiting requests get them."""
        self._pending = params, model
        self.engine.replace_params(params)
        self._wake.set()

    # --- the decode thread ------------------------------------------------------------------------------------------

    def _warmed(self, done: int, total: int) -> None:
        if self._stopping:
            raise _Stopped
        self.warmed_up = min(done / total, 0.99)  # all of it when the engine may be stepped

    def _run(self) -> None:
        try:
            if self._warm_up is not None:
                self._warm_up(self._warmed)
                self._beat, self.warmed_up = time.monotonic(), 1.0
            while not self._stopping:
                # 1. Sleep until a request comes, one is cancelled, or parameters are replaced.
                self._wake.wait()
                self._wake.clear()
                going, events, soon = True, [], False
                while going and not self._stopping:
                    # 2. Is anything to be done? If not, one more step still frees the slots.
                    going = self.engine.live > 0 or self._pending is not None
                    self._beat = time.monotonic()
                    # 3. A shorter call where a request has just ended and the next is likely to come at once.
                    soon = not soon and any(e.finished for e in events) and self.engine.live < self.engine.slots
                    steps = max(1, self.engine.steps_per_call // SOON) if soon else None
                    # 4. Step the engine; while the device works, the event loop gets the last step's tokens.
                    events = self.engine.step(functools.partial(self._hand_on, events, self.model), steps)
                    # 5. Have the new parameters taken over?
                    if self._pending is not None and self.engine.params is self._pending[0]:
                        self.model, self._pending = self._pending[1], None
                        logger.info("now serving %s", self.model.fingerprint)
                # 6. The last step's tokens.
                self._hand_on(events, self.model)
        except _Stopped:
            return
        except BaseException as error:
            if self.warmed_up < 1:
                self.failure = error
                self._on_loop(self._failed)
                self._on_loop(self.on_failed_start)
                return
            logger.critical("the decode thread failed; the server can answer no more requests", exc_info=error)
            self.failure = error
            self._on_loop(self._failed)

    def _hand_on(self, events: Sequence[Event], model: ServedModel) -> None:
        if events:
            self._on_loop(self._deliver, events, model)

    def _on_loop(self, function, *arguments) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: the server is gone
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, events, model: ServedModel) -> None:
        for event in sorted(events, key=lambda event: event.finished is None):  # clients that are done may ask again
            entry = self._running.get(event.request)
            if entry is None:
                continue
            generation, index = entry
            known = event.logprobs, event.alternatives
            generation.receive(index, Update(index, event.tokens, event.finished, model, *known), self.metrics)
            if event.finished:
                del self._running[event.request]
                self._seconds += 0.1 * (time.monotonic() - generation.began - self._seconds)

    def _failed(self) -> None:
        self.end_all(WorkerFailed())
        for request in list(self._running):
            self.release(request)
