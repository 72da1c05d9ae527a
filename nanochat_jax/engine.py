"""The engine: text generation for everyone (chat, web, evaluations, reinforcement learning rollouts).

A fixed number of slots share one KV cache. Requests wait in a queue, take a free slot, have their prompt prefilled in
chunks while other slots go on, then all live slots decode together, several tokens per call of one compiled loop, each
row with its own position, temperature, top-k, seed and length. They may join, end and be cancelled between any two
calls.

The prompt's last token is not prefilled: it is the first token the decode loop is fed. So every row samples its own
first token (the reference shares one among all samples of a request), and there is one place where tokens are sampled.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np

from nanochat_jax import decode, gpt
from nanochat_jax.kv_cache import KVSlots
from nanochat_jax.request import Event, Request, SpecialTokens, TextCoder, checked_prompt

PREFILL_CHUNK = 512
SMALLEST_BUCKET = 16
SMALLEST_VISIBLE = 64


class Engine:
    """Continuous batching over `slots` rows of `capacity` tokens (prompt and answer together).

    `model` is anything with gpt's `forward_cached` and `unembed`. Without a tokenizer there are no end tokens and no
    calculator; with one that lacks the chat tokens (a stock GPT-2 one) only its bos ends a row. Drive it from one
    thread: `submit` and `cancel` may be called from any, `step` and the two `generate` from one at a time.
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
        model: ModuleType | Any = gpt,
    ):
        """capacity: positions per slot, default sequence_len, at most the rotary range 10 * sequence_len.
        steps_per_call: tokens per compiled call (default: fewer the larger the model, so that streaming stays smooth).
        logprobs: also give each request the log-probabilities of its tokens.
        """
        limit = 10 * config.sequence_len
        self.capacity = config.sequence_len if capacity is None else capacity
        if not 1 <= self.capacity <= limit:
            raise ValueError(f"capacity must be between 1 and 10 x sequence_len = {limit}, got {self.capacity}")
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.steps_per_call = steps_per_call or _default_steps(config)
        self._logprobs = logprobs
        self._slots: list[Request | None] = [None] * slots
        self._queue: deque[Request] = deque()
        self._numbers = itertools.count()
        self.params = params
        # Every slot is a little longer than promised: padding of a prefill chunk and unused columns of a decode call
        # are written too, and XLA would move such a write back over valid tokens rather than let it overhang.
        begin = (self.capacity - 1) // PREFILL_CHUNK * PREFILL_CHUNK  # of the longest prompt's last chunk
        physical = max(
            _round_up(self.capacity, SMALLEST_VISIBLE),
            self.capacity + self.steps_per_call,
            begin + _bucket(self.capacity - begin),
        )
        self._storage = KVSlots.create(config.n_layer, slots, config.n_kv_head, physical, config.head_dim, config.dtype)
        self._special = SpecialTokens.of(tokenizer)

    # --- parameters -------------------------------------------------------------------------------------------------

    @property
    def params(self) -> gpt.Params:
        """The parameters in use. Assign new ones of the same shapes between requests; nothing is recompiled."""
        return self._params

    @params.setter
    def params(self, params: gpt.Params) -> None:
        if self.live:
            raise RuntimeError("parameters cannot change while requests run: their cached keys belong to the old ones")
        dtype = self.config.dtype  # matmuls cast the weights anyway: do it once, not once a token
        self._params = params
        self._cast = jax.tree.map(
            lambda x: x.astype(dtype) if x.dtype == np.float32 and dtype != np.float32 else x, params
        )

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(
        self,
        tokens: Sequence[int],
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        *,
        stream: int = 0,
        run_on: bool = False,
        leader: Request | None = None,
    ) -> Request:
        """Queues a prompt (non-empty ids) and returns its handle at once.

        max_tokens None = to the end of the slot. top_k None or 0 = off, above the vocabulary = the vocabulary. seed:
        any integer (32 bits of it count); stream: which of several samples of one seed. The answer depends on these,
        not on what else runs. run_on: do not stop at an end token (only set `ended`). leader: an earlier request with
        the same prompt, whose prefilled keys are then copied instead of computed again. Raises ValueError for settings
        that cannot work, naming the numbers.
        """
        prompt = checked_prompt(tokens, self.config.vocab_size)
        if not temperature >= 0 or temperature == float("inf"):
            raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 or None = off), got {top_k}")
        room = self.capacity - len(prompt) + 1  # the last token of an answer is never fed back
        if len(prompt) > self.capacity:
            raise ValueError(f"the prompt has {len(prompt)} tokens, but a slot of this engine holds {self.capacity}")
        if max_tokens is None:
            max_tokens = room
        if max_tokens < 0:
            raise ValueError(f"max_tokens must be at least 0, got {max_tokens}")
        if max_tokens > room:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_tokens={max_tokens} do not fit the {self.capacity} "
                f"positions of a slot: ask for at most {room}, or build the Engine with a larger capacity"
            )
        k = min(top_k or 0, self.config.vocab_size)
        request = Request(prompt, max_tokens, float(temperature), k, seed, stream, run_on, next(self._numbers))
        if leader is not None and leader.prompt != prompt:
            raise ValueError("the leader of a request must have the same prompt")
        request.leader = leader
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
        return len([r for r in [*self._slots, *self._queue] if r is not None and r.finished is None])

    def step(self) -> list[Event]:
        """Admits what fits, prefills one chunk of each new prompt, decodes one call; what each request gained.

        Events come in the order of submission. An empty list while requests are live means that prompts are being
        prefilled; when none is live there is nothing to do.
        """
        self._admit()
        for request in self._slots:
            if request is not None and not request.ready:
                self._prefill(request)
        return self._decode([r for r in self._slots if r is not None and r.ready])

    def _admit(self) -> None:
        for slot, request in enumerate(self._slots):
            if request is not None and request.finished is not None:
                self._slots[slot] = None
        for slot, request in enumerate(self._slots):
            while request is None and self._queue:
                waiting = self._queue.popleft()
                if waiting.finished is None:
                    request = self._slots[slot] = waiting
                    waiting.slot = slot

    def _prefill(self, request: Request) -> None:
        """One chunk of a prompt, or a copy of its leader's prompt."""
        total, slot = len(request.prompt) - 1, request.slot
        leader = request.leader
        if leader is not None and leader.slot is not None and self._slots[leader.slot] is leader:
            if leader.ready:  # a slot's prompt never changes while its request lives
                pair = np.array([leader.slot, slot], np.int32)
                self._storage = decode.copy_row(self._storage, pair, visible=self._visible(total))
                request.prefilled = total
            return
        begin = request.prefilled
        chunk = request.prompt[begin : min(total, begin + PREFILL_CHUNK)]
        ids = np.zeros((1, _bucket(len(chunk))), np.int32)
        ids[0, : len(chunk)] = chunk
        where = np.array([slot, begin], np.int32)
        self._storage = decode.prefill(
            self.model, self.config, self._cast, self._storage, ids, where, visible=self._visible(begin)
        )
        request.prefilled += len(chunk)

    def _decode(self, ready: list[Request]) -> list[Event]:
        if not ready:
            return []
        room = self.steps_per_call
        rows = np.zeros((len(self._slots), decode.N_COLUMNS + room), np.int32)
        for request in self._slots:
            if request is not None:
                self._fill_row(rows[request.slot], request)
        steps = min(room, min(r.max_tokens - len(r.tokens) for r in ready))
        shared = [steps, self._special.python_end, *sorted(self._special.ends), -1, -1][:4]
        visible = self._visible(max(len(r.prompt) - 1 + len(r.tokens) for r in ready))
        packed, self._storage = decode.decode(
            self.model,
            self.config,
            self._cast,
            self._storage,
            rows,
            np.array(shared, np.int32),
            visible=visible,
            room=room,
            logprobs=self._logprobs,
        )
        packed = np.asarray(packed)
        parts = packed[:-1].reshape(-1, len(self._slots), room)[:, :, : packed[-1]]
        events = [r.receive(parts[0, r.slot].tolist(), self._special) for r in ready if r.finished is None]
        if self._logprobs:
            for event in events:
                event.request.logprobs += parts[1, event.request.slot].view(np.float32).tolist()
        return sorted(events, key=lambda event: event.request.number)

    def _fill_row(self, row: np.ndarray, request: Request) -> None:
        if not request.ready:  # decoded along with the others; what that writes must land after the prompt so far
            row[decode.POSITION] = request.prefilled
            return
        n = len(request.tokens)
        row[decode.TOKEN] = request.tokens[-1] if n else request.prompt[-1]
        row[decode.POSITION] = len(request.prompt) - 1 + n
        row[decode.COUNT] = n
        row[decode.SEED] = np.uint32(request.seed & 0xFFFFFFFF).view(np.int32)
        row[decode.STREAM] = request.stream
        row[decode.TEMPERATURE] = decode.float_bits(request.temperature)
        row[decode.TOP_K] = request.top_k
        row[decode.STOPS] = decode.STOP_AT_TOOL | (0 if request.ended else decode.STOP_AT_END)
        forced = list(itertools.islice(request.forced, self.steps_per_call))
        row[decode.N_FORCED] = len(forced)
        row[decode.N_COLUMNS : decode.N_COLUMNS + len(forced)] = forced

    def _visible(self, tokens: int) -> int:
        """How many old positions a call looks at: powers of two, so that there are few programs."""
        if tokens == 0:
            return 0
        return min(max(SMALLEST_VISIBLE, 1 << (tokens - 1).bit_length()), _round_up(self.capacity, SMALLEST_VISIBLE))

    def warm_up(self) -> int:
        """Compiles every program this engine can need, so that nothing is compiled while it serves; returns how many.

        Call it while no request is live. Without it each program is compiled when it is first needed.
        """
        if self.live:
            raise RuntimeError("warm_up needs an idle engine")
        sizes = sorted({self._visible(n) for n in range(self.capacity + 1)})
        pair = np.zeros(2, np.int32)
        rows = np.zeros((len(self._slots), decode.N_COLUMNS + self.steps_per_call), np.int32)
        before = decode.compiled_programs()
        for visible in sizes:
            self._storage = decode.copy_row(self._storage, pair, visible=visible)
            _, self._storage = decode.decode(
                self.model, self.config, self._cast, self._storage, rows, np.array([0, -1, -1, -1], np.int32),
                visible=visible, room=self.steps_per_call, logprobs=self._logprobs,
            )  # fmt: skip
        for begin in range(0, self.capacity, PREFILL_CHUNK):
            for length in {_bucket(n + 1) for n in range(min(PREFILL_CHUNK, self.capacity - begin))}:
                self._storage = decode.prefill(
                    self.model, self.config, self._cast, self._storage, np.zeros((1, length), np.int32), pair,
                    visible=self._visible(begin),
                )  # fmt: skip
        return decode.compiled_programs() - before

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
        if not 1 <= num_samples <= len(self._slots):
            raise ValueError(
                "generate streams all samples together: num_samples must be between 1 and the engine's "
                f"{len(self._slots)} slots, got {num_samples}; generate_batch takes any number"
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
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
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
        rows: list[Request] = []
        for stream in range(num_samples):
            leader = rows[0] if rows else None
            rows.append(
                self.submit(tokens, max_tokens, temperature, top_k, seed, stream=stream, run_on=run_on, leader=leader)
            )
        return rows


def _default_steps(config: gpt.GPTConfig) -> int:
    """Tokens per call: about a twentieth of a second by the model's size, so a stream never stutters. Not measured at
    run time on purpose: the same machine must make the same calls."""
    bytes_per_second = 25e9 if jax.default_backend() == "cpu" else 1.5e12
    seconds = gpt.num_params(config) * 4 / bytes_per_second
    return int(min(32, max(4, 0.05 / seconds)))


def _bucket(n: int) -> int:
    return max(SMALLEST_BUCKET, 1 << (n - 1).bit_length())


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
