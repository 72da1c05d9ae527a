"""The engine: text generation for everyone (chat, web, evaluations, reinforcement learning rollouts).

A fixed number of slots share one KV cache. Requests wait in a queue, take a free slot, have their prompt prefilled in
chunks while other slots go on, then all live slots decode together, several tokens per call of one compiled loop, each
row with its own position, temperature, top-k, top-p, seed and length. They may join, end and be cancelled between any
two calls. What a slot holds of an earlier request is used again where a prompt begins with it (`slot_table`).

The prompt's last token is not prefilled: it is the first token the decode loop is fed. So every row samples its own
first token (the reference shares one among all samples of a request), and there is one place where tokens are sampled.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from types import ModuleType
from typing import Any

import jax
import numpy as np

from nanochat_jax.inference import decode
from nanochat_jax.inference.model_runner import PREFILL_CHUNK, SlotPrograms
from nanochat_jax.inference.request import Event, Request, SpecialTokens, TextCoder, new_request
from nanochat_jax.inference.scheduler import SlotTable
from nanochat_jax.model import gpt
from nanochat_jax.text.calculator import use_calculator
from nanochat_jax.utils.errors import InputError

# A decode call ends when this share of its rows has stopped. Ending at the first would let the host in after nearly
# every token when many rows run; waiting for more would let stopped rows compute tokens that nobody reads.
ENOUGH_STOPPED = 8
TOOL_GRACE = 0.002  # seconds a call waits for the calculator (20 microseconds of work) so that its row loses no call


class Engine:
    """Continuous batching over `slots` rows of `capacity` tokens (prompt and answer together).

    `model` is anything with gpt's `forward_cached` and `unembed`. Without a tokenizer there are no end tokens and no
    calculator; with one that lacks the chat tokens (a stock GPT-2 one) only its bos ends a row. Drive it from one
    thread: `submit`, `cancel` and `replace_params` may be called from any, `step` and the two `generate` from one at a
    time.
    """

    def __init__(
        self,
        config: gpt.GPTConfig,
        params: gpt.Params,
        tokenizer: TextCoder | None = None,
        *,
        slots: int = 8,
        capacity: int | None = None,
        steps_per_call: int | None = None,
        logprobs: bool = False,
        devices: Sequence[Any] | None = None,
        tool: Callable[[str], Any] = use_calculator,
        wait_for_tools: bool = False,
        model: ModuleType | Any = gpt,
    ):
        """capacity: positions per slot, default sequence_len, at most the rotary range 10 * sequence_len.
        steps_per_call: tokens per compiled call (default: fewer the larger the model, so that streaming stays smooth).
        logprobs: also give each request the log-probabilities of its tokens. devices: where the slots are dealt to, a
        multiple of their number (rounded up); default the first device alone. tool: what a tool call runs, from text to
        an answer or None, on a thread of its own. wait_for_tools: no row goes on before every tool is done, so that
        which rows are decoded together depends on no clock: rollouts and evaluations are to repeat to the bit.
        """
        limit = 10 * config.sequence_len
        self.capacity = config.sequence_len if capacity is None else capacity
        if not 1 <= self.capacity <= limit:
            raise InputError(f"capacity must be between 1 and 10 x sequence_len = {limit}, got {self.capacity}")
        if slots < 1:
            raise InputError(f"slots must be at least 1, got {slots}")
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.steps_per_call = steps_per_call or _default_steps(config)
        self._logprobs = logprobs
        self._programs = SlotPrograms(model, config, slots, self.capacity, self.steps_per_call, logprobs, devices)
        self._table = SlotTable(self._programs.slots, self._programs.devices)
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
        return len(self._table)

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
        ones wait and are answered by the new ones."""
        self._next_params = params

    def _set_params(self, params: gpt.Params) -> None:
        self._params = params
        self._programs.set_params(params)
        self._table.forget()

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(
        self,
        tokens: Sequence[int],
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        *,
        top_p: float | None = None,
        stream: int = 0,
        run_on: bool = False,
    ) -> Request:
        """Queues a prompt (non-empty ids) and returns its handle at once.

        max_tokens None = to the end of the slot. top_k None or 0 = off, above the vocabulary = the vocabulary. top_p
        None or 1 = off. seed: any integer (32 bits of it count); stream: which of several samples of one seed. The
        answer depends on these, not on what else runs. run_on: do not stop at an end token (only set `ended`). Raises
        ValueError for settings that cannot work, naming the numbers.
        """
        request = new_request(
            tokens, self.config.vocab_size, self.capacity, max_tokens, temperature, top_k, top_p, seed, stream, run_on,
            next(self._numbers),
        )  # fmt: skip
        if max_tokens == 0:
            request.finished = "length"
        else:
            self._queue.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request now; its slot is free from the next step on. No effect on a finished one."""
        if request.finished is None:
            request.finished = "cancelled"

    @property
    def live(self) -> int:
        """Requests running or waiting."""
        return len([r for r in [*self._table.requests, *self._queue] if r is not None and r.finished is None])

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
        self._take_answers(meanwhile)
        self._table.release()
        self._admit()
        self._prefill()
        events = self._decode(meanwhile, min(steps or self.steps_per_call, self.steps_per_call))
        meanwhile()
        return events

    def _take_answers(self, meanwhile: Callable[[], None]) -> None:
        """Goes on with the rows whose tool is done; waits a moment for one if no row can do anything else."""
        busy = [r for r in self._table.busy if r.finished is None]
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
            if self._table.busy:
                return
            self._set_params(self._next_params)
            self._next_params = None
        while self._queue:
            request = self._queue[0]
            if request.finished is None:
                seat = self._table.seat(request)
                if seat is None:
                    return
                request.slot, request.reused = seat.slot, seat.shared
                if seat.leader is not None and seat.leader.prefilled < seat.shared:
                    request.leader = seat.leader
                else:
                    self._share(seat.source, request)
                if not request.ready:
                    self._prefilling.append(request)
            self._queue.popleft()

    def _share(self, source: int, request: Request) -> None:
        """The beginning of a prompt, from the slot where it was computed."""
        if source != request.slot:
            self._programs.copy(source, request.slot, request.reused)
        request.prefilled = request.reused

    def _prefill(self) -> None:
        """Chunks of prompts, in turn: all that is needed while no row decodes, else one chunk's worth a step."""
        self._prefilling = deque(r for r in self._prefilling if r.finished is None)
        decoding = any(r.ready for r in self._table.busy)
        spent = 0
        while self._prefilling and not (decoding and spent >= PREFILL_CHUNK):
            turn: list[Request] = []
            waiting: list[Request] = []
            for request in self._prefilling:
                if self._must_wait(request):
                    waiting.append(request)
                elif not request.ready:
                    others = [(r.slot, r.prefilled, r.left) for r in turn]
                    joins = self._programs.joins(others, request.slot, request.prefilled, request.left)
                    (turn if joins else waiting).append(request)
            if turn:
                rows = [(r.slot, r.prefilled, r.prompt[r.prefilled : -1]) for r in turn]
                cost, taken = self._programs.prefill(rows)
                for request, n in zip(turn, taken, strict=True):
                    request.prefilled += n
                spent += cost
            self._prefilling = deque([*waiting, *(r for r in turn if not r.ready)])

    def _must_wait(self, request: Request) -> bool:
        """Whether the beginning of a prompt is still being computed in another slot; if it has been, it is copied."""
        leader = request.leader
        if leader is None:
            return False
        still_there = leader.finished is None and self._table.requests[leader.slot] is leader
        if still_there and leader.prefilled < request.reused:
            return True
        request.leader = None
        if still_there:
            self._share(leader.slot, request)
        else:
            request.reused = 0
        return False

    def _decode(self, meanwhile: Callable[[], None], most: int) -> list[Event]:
        ready = [r for r in self._table.busy if r.ready and r.finished is None]
        if not ready:
            return []
        programs = self._programs
        room, per_device = self.steps_per_call, programs.per_device
        chosen = programs.choose([r.slot for r in ready])
        rows = np.zeros((chosen.size, decode.N_COLUMNS + room), np.int32)
        slots: list[int] = (chosen + per_device * np.arange(programs.devices)[:, None]).ravel().tolist()
        for row, slot in zip(rows, slots, strict=True):
            self._fill_row(row, slot, self._table.requests[slot])
        shared = np.full((programs.devices, decode.N_SHARED + 2), -1, np.int32)
        shared[:, decode.STEPS] = min(most, max(r.max_tokens - len(r.tokens) for r in ready))
        for device in range(programs.devices):
            running = sum(r.slot // per_device == device for r in ready)
            shared[device, decode.ENOUGH] = -(-running // ENOUGH_STOPPED)
        shared[:, decode.TOOL] = self._special.python_end
        ends = sorted(self._special.ends)[:2]
        shared[:, decode.N_SHARED : decode.N_SHARED + len(ends)] = ends
        packed = programs.decode(chosen, rows, shared, max(r.position for r in ready), meanwhile)
        events = []
        for request in sorted(ready, key=lambda r: r.number):
            if request.finished is not None:  # cancelled meanwhile
                continue
            device, slot = divmod(request.slot, per_device)
            row = chosen[device].tolist().index(slot)
            parts = packed[device, :-1].reshape(-1, chosen.shape[1], room)[:, row, : packed[device, -1]]
            event = request.receive(parts[0].tolist(), self._special, self._run_tool)
            if self._logprobs:
                request.logprobs += parts[1, : len(event.tokens)].view(np.float32).tolist()
            events.append(event)
        return events

    def _run_tool(self, text: str):
        return self._tools.submit(self._tool, text)

    def _fill_row(self, row: np.ndarray, slot: int, request: Request | None) -> None:
        row[decode.REMAINING] = decode.ENDLESS
        if request is None or not request.ready or request.finished is not None:
            # decoded along with the others; what that writes must land after what the slot holds
            row[decode.POSITION] = self._table.held(slot) if request is None else request.position
            return
        n = len(request.tokens)
        row[decode.TOKEN] = request.tokens[-1] if n else request.prompt[-1]
        row[decode.POSITION] = request.position
        row[decode.COUNT] = n
        row[decode.SEED] = np.uint32(request.seed & 0xFFFFFFFF).view(np.int32)
        row[decode.STREAM] = request.stream
        row[decode.TEMPERATURE] = decode.float_bits(request.temperature)
        row[decode.TOP_K] = request.top_k
        row[decode.TOP_P] = decode.float_bits(request.top_p)
        row[decode.STOPS] = decode.STOP_AT_TOOL | (0 if request.ended else decode.STOP_AT_END)
        row[decode.REMAINING] = request.max_tokens - n
        forced = list(itertools.islice(request.forced, self.steps_per_call))
        row[decode.N_FORCED] = len(forced)
        row[decode.N_COLUMNS : decode.N_COLUMNS + len(forced)] = forced

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Compiles every program this engine can need, so that nothing is compiled while it serves; returns how many.

        Call it while no request is live. Without it each program is compiled when it is first needed. progress is
        called with (done, total).
        """
        if self.live:
            raise RuntimeError("warm_up needs an idle engine")
        self._table.forget()
        return self._programs.warm_up(progress)

    # --- many samples of one prompt ---------------------------------------------------------------------------------

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yields (token_column, token_masks), lists of num_samples ints, one step at a time (reference section 4.3).

        A row that has produced an end token keeps producing columns until all have; ignore them. mask 0 = put there by
        the calculator. The prompt is prefilled once. Sample i of a seed is the same whatever num_samples is. Raises
        ValueError where num_samples exceeds the slots, and as `submit`. Closing the iterator cancels the rows.
        """
        if not 1 <= num_samples <= self.slots:
            raise InputError(
                "generate streams all samples together: num_samples must be between 1 and the engine's "
                f"{self.slots} slots, got {num_samples}; generate_batch takes any number"
            )
        rows = self._submit_samples(tokens, num_samples, max_tokens, temperature, top_k, seed, run_on=True)
        return self._columns(rows)

    def _columns(self, rows: list[Request]) -> Iterator[tuple[list[int], list[int]]]:
        ended = [False] * len(rows)
        column = 0
        try:
            while not all(ended) and not (all(r.finished for r in rows) and column >= len(rows[0].tokens)):
                if min(len(r.tokens) for r in rows) <= column:
                    self.step()
                    continue
                tokens = [r.tokens[column] for r in rows]
                ended = [done or token in self._special.ends for done, token in zip(ended, tokens, strict=True)]
                yield tokens, [r.masks[column] for r in rows]
                column += 1
        finally:
            for request in rows:
                self.cancel(request)

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, **settings
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(results, masks), each num_samples lists: prompt and answer, without the end token; prompt masks are 0.

        Any number of samples: what does not fit the slots waits for one. settings as for `generate`; the answers are
        the same as there.
        """
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {num_samples}")
        rows = self._submit_samples(tokens, num_samples, run_on=False, **settings)
        try:
            while any(r.finished is None for r in rows):
                self.step()
        finally:
            for request in rows:
                self.cancel(request)
        results, masks = [], []
        for r in rows:
            n = len(r.tokens) - (1 if r.finished == "end" else 0)
            results.append(r.prompt + r.tokens[:n])
            masks.append([0] * len(r.prompt) + r.masks[:n])
        return results, masks

    def _submit_samples(
        self, tokens, num_samples, max_tokens=None, temperature=1.0, top_k=None, seed=42, *, run_on
    ) -> list[Request]:
        return [
            self.submit(tokens, max_tokens, temperature, top_k, seed, stream=stream, run_on=run_on)
            for stream in range(num_samples)
        ]


def _once(function: Callable[[], None]) -> Callable[[], None]:
    """The function, for the first call only."""
    left = [function]
    return lambda: left.pop()() if left else None


def _default_steps(config: gpt.GPTConfig) -> int:
    """Tokens per call: about a twentieth of a second by the model's size, so a stream never stutters. Not measured at
    run time on purpose: the same machine must make the same calls."""
    bytes_per_second = 25e9 if jax.default_backend() == "cpu" else 1.5e12
    seconds = gpt.num_params(config) * 4 / bytes_per_second
    return int(min(32, max(4, 0.05 / seconds)))
