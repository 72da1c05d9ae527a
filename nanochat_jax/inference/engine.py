"""The engine: text generation for everyone (chat, web, evaluations, reinforcement learning rollouts).

A fixed number of slots share one KV cache. Requests wait in a queue, take a free slot, have their prompt prefilled in
chunks while other slots decode, then all live slots decode together, several tokens per call of one compiled loop, each
row with its own position and `SamplingParams`. They may join, end and be cancelled between any two calls. What a slot
holds of an earlier request is used again where a prompt begins with it (`scheduler`). The programs that run on the
device are in `programs`.

The prompt's last token is not prefilled: it is the first token the decode loop is fed. So every row samples its own
first token (the reference shares one among all samples of a request), and there is one place where tokens are sampled.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from types import ModuleType
from typing import Any

import jax
import numpy as np

from nanochat_jax.inference import alternatives, programs
from nanochat_jax.inference.adjustments import Adjustments
from nanochat_jax.inference.model_runner import PREFILL_CHUNK, PROMPTS, ModelRunner
from nanochat_jax.inference.request import (
    DEFAULT_PARAMS,
    Completion,
    Event,
    Request,
    SamplingParams,
    SpecialTokens,
    new_request,
)
from nanochat_jax.inference.scheduler import Scheduler
from nanochat_jax.model import gpt
from nanochat_jax.text.calculator import use_calculator
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.errors import InputError

# A decode call ends when this share of its rows has stopped. Ending at the first would let the host in after nearly
# every token when many rows run; waiting for more would let stopped rows compute tokens that are thrown away.
ENOUGH_STOPPED = 8
MOST_STEPS = 32  # tokens of a call, where nobody says how many
TOOL_GRACE = 0.002  # seconds a call waits for the calculator (20 microseconds of work) so that its row loses no call


class Engine:
    """Continuous batching over `slots` rows of `capacity` tokens (prompt and completion together).

    `model` is anything with gpt's `forward_cached` and `unembed`. Without a tokenizer there are no end tokens, no stop
    strings and no calculator; with one that lacks the chat tokens (a stock GPT-2 one) only its bos ends a row. Drive it
    from one thread: `submit`, `cancel` and `replace_params` may be called from any, `step` and `generate` from one at a
    time.
    """

    def __init__(
        self,
        config: gpt.GPTConfig,
        params: gpt.Params,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        capacity: int | None = None,
        steps_per_call: int | None = None,
        devices: Sequence[Any] | None = None,
        tool: Callable[[str], Any] = use_calculator,
        wait_for_tools: bool = False,
        model: ModuleType | Any = gpt,
    ):
        """capacity: positions per slot, default sequence_len, at most the rotary range 10 * sequence_len.
        steps_per_call: tokens per compiled call (default: fewer the larger the model, so that streaming stays smooth).
        devices: what the slots are sharded over, a multiple of their number (rounded up); default the first alone.
        tool: what a tool call runs, from text to an answer or None, on a thread of its own. wait_for_tools: no row is
        decoded before every tool is done, so that which rows are decoded together depends on no clock: rollouts and
        evaluations are to repeat to the bit.
        """
        limit = 10 * config.sequence_len
        self.capacity = config.sequence_len if capacity is None else capacity
        if not 1 <= self.capacity <= limit:
            raise InputError(f"capacity must be between 1 and 10 x sequence_len = {limit}, got {self.capacity}")
        if slots < 1:
            raise InputError(f"slots must be at least 1, got {slots}")
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.steps_per_call = steps_per_call or _default_steps(config)
        self._runner = ModelRunner(model, config, slots, self.capacity, self.steps_per_call, devices)
        self._scheduler = Scheduler(self._runner.slots, self._runner.devices)
        self._queue: deque[Request] = deque()
        self._prefilling: deque[Request] = deque()
        self._numbers = itertools.count()
        self._wait_for_tools = wait_for_tools
        self._tool, self._tools = tool, ThreadPoolExecutor(max_workers=2, thread_name_prefix="tool")
        self._next_params: gpt.Params | None = None
        self._set_params(params)
        self._special = SpecialTokens.of(tokenizer)

    # --- parameters -------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """How many requests run at once."""
        return len(self._scheduler)

    @property
    def params(self) -> gpt.Params:
        """The parameters in use. Assign new ones of the same shapes between requests; nothing is recompiled."""
        return self._params

    @params.setter
    def params(self, params: gpt.Params) -> None:
        if self.live:
            raise RuntimeError("parameters cannot change while requests run: their cached keys belong to the old ones")
        self._set_params(params)

    def replace_params(self, params: gpt.Params) -> None:
        """New parameters of the same shapes as soon as no slot is busy: running requests end with the old ones, waiting
        ones get the new ones."""
        self._next_params = params

    def _set_params(self, params: gpt.Params) -> None:
        self._params = params
        self._runner.set_params(params)
        self._scheduler.forget()

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, tokens: Sequence[int], params: SamplingParams = DEFAULT_PARAMS) -> Request:
        """Queues a prompt (non-empty ids) and returns its handle at once.

        Results are batch-invariant: they depend on the prompt and `params`, not on what else runs. Raises ValueError
        for a prompt that cannot work, or `params` that this engine cannot serve, naming the numbers.
        """
        request = new_request(
            tokens, params, next(self._numbers), self.config.vocab_size, self.capacity, self.tokenizer
        )
        self._queue.append(request)
        return request

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        on_finished: Callable[[int, Completion], None] = lambda index, completion: None,
    ) -> list[Completion]:
        """Completes all prompts, any number of them, and returns the completions in the same order.

        params: for all prompts, or for each its own. on_finished(index, completion) is called as each one ends. Raises
        ValueError as `submit` does. An exception, of on_finished too, cancels the prompts that are not complete.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests: dict[Request, int] = {}
        try:
            for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
                requests[self.submit(prompt, own)] = index
            while any(request.finished is None for request in requests):
                for event in self.step():
                    if event.finished and event.request in requests:
                        on_finished(requests[event.request], event.request.completion(self.tokenizer))
        finally:
            for request in requests:
                self.cancel(request)
        return [request.completion(self.tokenizer) for request in requests]

    def cancel(self, request: Request) -> None:
        """Ends a request now; its slot is free from the next step on. No effect on a finished one."""
        if request.finished is None:
            request.finished = "cancelled"

    @property
    def live(self) -> int:
        """Requests running or waiting."""
        return len([r for r in [*self._scheduler.requests, *self._queue] if r is not None and r.finished is None])

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len([r for r in list(self._queue) if r.finished is None])

    def step(self, meanwhile: Callable[[], None] = lambda: None, steps: int | None = None) -> list[Event]:
        """Admits what fits, prefills some chunks of new prompts, decodes one call; what each request gained.

        Events come in the order of submission. An empty list while requests are live means that prompts are being
        prefilled or tools are at work; when none is live there is nothing to do. meanwhile: called once, as soon as the
        device is at work (or there is nothing for it to do): what the host can do at the same time, such as handing on
        the events of the step before. steps: the most tokens of this call, fewer than `steps_per_call` where somebody
        is about to come.
        """
        meanwhile = _once(meanwhile)
        # 1. Resume the rows whose tool call is done.
        self._take_answers(meanwhile)
        # 2. Set the slots of finished requests free.
        self._scheduler.release()
        # 3. Assign free slots to waiting requests, with whatever prefix of their prompt is in the cache.
        self._admit()
        # 4. Prefill: the prompts' next chunks.
        self._prefill()
        # 5. Decode: one call of the compiled loop over all rows that are ready.
        events = self._decode(meanwhile, min(steps or self.steps_per_call, self.steps_per_call))
        meanwhile()
        return events

    def _take_answers(self, meanwhile: Callable[[], None]) -> None:
        """Resumes the rows whose tool is done; waits a moment for one if no row can do anything else."""
        busy = [r for r in self._scheduler.busy if r.finished is None]
        working = [r.tool for r in busy if r.tool is not None]
        if working:
            meanwhile()
        if working and self._wait_for_tools:
            wait(working)
        elif working:
            wait(working, 0.05 if len(working) == len(busy) else TOOL_GRACE, FIRST_COMPLETED)
        for request in busy:
            if request.tool is not None and request.tool.done():
                request.take_answer(self._special)

    def _admit(self) -> None:
        if self._next_params is not None:
            if self._scheduler.busy:
                return
            self._set_params(self._next_params)
            self._next_params = None
        while self._queue:
            request = self._queue[0]
            if request.finished is None:
                assignment = self._scheduler.assign(request)
                if assignment is None:
                    return
                request.slot, request.reused = assignment.slot, assignment.shared
                donor = assignment.prefix_donor
                if donor is not None and donor.prefilled < assignment.shared:
                    request.prefix_donor = donor
                else:
                    self._share(assignment.source, request)
                if not request.ready:
                    self._prefilling.append(request)
            self._queue.popleft()

    def _share(self, source: int, request: Request) -> None:
        """The prefix of a prompt, from the slot where it was computed."""
        if source != request.slot:
            self._runner.copy(source, request.slot, request.reused)
        request.prefilled = request.reused

    def _prefill(self) -> None:
        """Chunks of prompts, in turn: all that is needed while no row decodes, else one chunk's worth a step."""
        self._prefilling = deque(r for r in self._prefilling if r.finished is None)
        decoding = any(r.ready for r in self._scheduler.busy)
        spent = 0
        while self._prefilling and not (decoding and spent >= PREFILL_CHUNK):
            spent += self._score()
            turn: list[Request] = []
            waiting: list[Request] = []
            for request in self._prefilling:
                if self._must_wait(request) or request.params.prompt_logprobs is not None and not request.ready:
                    waiting.append(request)
                elif not request.ready:
                    others = [(r.slot, r.prefilled, r.left) for r in turn]
                    joins = self._runner.joins(others, request.slot, request.prefilled, request.left)
                    (turn if joins else waiting).append(request)
            if turn:
                rows = [(r.slot, r.prefilled, r.prompt) for r in turn]
                cost, taken = self._runner.prefill(rows)
                for request, n in zip(turn, taken, strict=True):
                    request.prefilled += n
                spent += cost
            self._prefilling = deque([*waiting, *(r for r in turn if not r.ready)])

    def _score(self) -> int:
        """A chunk of each of some prompts whose log-probabilities are wanted; returns what it cost."""
        wanted = [r for r in self._prefilling if r.params.prompt_logprobs is not None and not r.ready]
        turn: list[Request] = []
        for request in wanted:
            same = [r for r in turn if r.slot // self._runner.per_device == request.slot // self._runner.per_device]
            if len(same) < PROMPTS:
                turn.append(request)
        if not turn:
            return 0
        rows = [(r.slot, r.prefilled, r.prompt, r.params.prompt_logprobs or 0) for r in turn]
        cost, taken, found = self._runner.score(rows)
        for request, n, (logprobs, top) in zip(turn, taken, found, strict=True):
            request.prefilled += n
            request.prompt_logprobs += logprobs
            request.prompt_alternatives += top
        return cost

    def _must_wait(self, request: Request) -> bool:
        """Whether the prefix of a prompt is still being computed in another slot; if it has been, it is copied."""
        donor = request.prefix_donor
        if donor is None:
            return False
        still_there = donor.finished is None and self._scheduler.requests[donor.slot] is donor
        if still_there and donor.prefilled < request.reused:
            return True
        request.prefix_donor = None
        if still_there:
            self._share(donor.slot, request)
        else:
            request.reused = 0
        return False

    def _decode(self, meanwhile: Callable[[], None], most: int) -> list[Event]:
        # 1. The rows that can decode, and slots to make up one of the few batch sizes there are programs for.
        ready = [r for r in self._scheduler.busy if r.ready and r.finished is None]
        if not ready:
            return []
        runner, max_new_steps = self._runner, self._runner.max_new_steps
        batch = runner.batch([r.slot for r in ready])
        for request in ready:
            request.force()
        # 2. What the program is told: a row of numbers for each slot, and when to end.
        rows = np.zeros((batch.size, programs.N_COLUMNS + max_new_steps), np.int32)
        slots: list[int] = (batch + runner.per_device * np.arange(runner.devices)[:, None]).ravel().tolist()
        for row, slot in zip(rows, slots, strict=True):
            self._fill_row(row, slot, self._scheduler.requests[slot])
        control = self._control(ready, most)
        adjustments = self._adjustments(ready, slots)
        # 3. The call, several tokens for every row.
        longest = max(r.position for r in ready)
        packed, known = runner.decode(batch, rows, control, adjustments, longest, meanwhile)
        # 4. Hand out the new tokens, in the order of submission; requests may have been cancelled meanwhile.
        events = []
        for request in sorted(ready, key=lambda r: r.number):
            if request.finished is not None:
                continue
            device, slot = divmod(request.slot, runner.per_device)
            row = batch[device].tolist().index(slot)
            column = packed[device, :-1].reshape(batch.shape[1], max_new_steps)[row, : packed[device, -1]]
            column = column[: request.steps]
            about: tuple[list, list] = [], []
            if known is not None and (n := request.params.logprobs) is not None:
                about = alternatives.read(known[device * batch.shape[1] + row, : len(column)], n)
            events.append(request.receive(column.tolist(), self._special, self._run_tool, *about))
        return events

    def _adjustments(self, ready: list[Request], slots: list[int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Biases and counts (rows, V) for the rows of these slots; None where no row's logits are adjusted."""
        if not any(r.params.adjusts for r in ready):
            return None
        shape = len(slots), self.config.vocab_size
        bias, seen = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
        for request in ready:
            if request.params.adjusts:
                request.adjustments = request.adjustments or Adjustments(request, self.config.vocab_size)
                row = slots.index(request.slot)
                request.adjustments.fill(request.tokens, bias[row], seen[row])
        return bias, seen

    def _control(self, ready: list[Request], most: int) -> np.ndarray:
        """When the call ends, and at which tokens rows stop: a row of numbers for each device."""
        devices = self._runner.devices
        control = np.full((devices, programs.N_CONTROL + 2), -1, np.int32)
        control[:, programs.STEPS] = min(most, max(r.max_tokens - len(r.tokens) for r in ready))
        for device in range(devices):
            running = sum(r.slot // self._runner.per_device == device for r in ready)
            control[device, programs.ENOUGH] = -(-running // ENOUGH_STOPPED)
        control[:, programs.TOOL] = self._special.python_end
        control[:, programs.ADJUST] = any(r.params.adjusts for r in ready)
        control[:, programs.TOP] = max(-1 if (n := r.params.logprobs) is None else n for r in ready)
        ends = sorted(self._special.ends)[:2]
        control[:, programs.N_CONTROL : programs.N_CONTROL + len(ends)] = ends
        return control

    def _run_tool(self, text: str):
        return self._tools.submit(self._tool, text)

    def _fill_row(self, row: np.ndarray, slot: int, request: Request | None) -> None:
        """What the decode program is told of one row (`programs` has the columns)."""
        row[programs.REMAINING] = programs.ENDLESS
        if request is None or not request.ready or request.finished is not None:
            # decoded along with the others; what that writes must land after what the slot holds
            row[programs.POSITION] = self._scheduler.held(slot) if request is None else request.position
            return
        params, n = request.params, len(request.tokens)
        before, token = [-1, *request.prompt[-2:], *request.tokens[-2:]][-2:]
        row[programs.PREVIOUS], row[programs.TOKEN] = before, token
        row[programs.POSITION] = request.position
        row[programs.COUNT] = n
        row[programs.SEED] = np.uint32(params.seed & 0xFFFFFFFF).view(np.int32)
        row[programs.SAMPLE_INDEX] = params.sample_index
        row[programs.TOP_K] = min(params.top_k, self.config.vocab_size)
        row[programs.TEMPERATURE : programs.STOPS] = programs.fractions(params)
        row[programs.STOPS] = programs.STOP_AT_TOOL | (0 if request.ended else programs.STOP_AT_END)
        row[programs.REMAINING] = min(request.max_tokens - n, request.steps)
        forced = list(itertools.islice(request.forced, self.steps_per_call))
        row[programs.N_FORCED] = len(forced)
        row[programs.N_COLUMNS : programs.N_COLUMNS + len(forced)] = forced

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Compiles every program this engine can need, so that nothing is compiled while it serves; returns how many.

        Call it while no request runs; they may wait. Without it each program is compiled when it is first needed.
        progress is called with (done, total).
        """
        if self._scheduler.busy:
            raise RuntimeError("warm_up needs an idle engine")
        self._scheduler.forget()
        return self._runner.warm_up(progress)


def _once(function: Callable[[], None]) -> Callable[[], None]:
    """The function, for the first call only."""
    left = [function]
    return lambda: left.pop()() if left else None


def _default_steps(config: gpt.GPTConfig) -> int:
    """Tokens per call: about a twentieth of a second by the model's size, so a stream never stutters. Not measured at
    run time on purpose: the same machine must make the same calls."""
    bytes_per_second = 25e9 if jax.default_backend() == "cpu" else 1.5e12
    seconds = gpt.num_params(config) * 4 / bytes_per_second
    return int(min(MOST_STEPS, max(4, 0.05 / seconds)))
