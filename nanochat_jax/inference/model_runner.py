"""The engine's device side: the slots' storage, the parameters as they are multiplied, and the calls that use them.

What the host decides comes in as numbers of slots and tokens; what has to be rounded up, so that there are few compiled
programs, is rounded up here. `decode` has the programs themselves.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nanochat_jax.inference import decode
from nanochat_jax.model.kv_cache import KVSlots, reads_in_place
from nanochat_jax.parallel import sharding

PREFILL_CHUNK = 512
SMALLEST_BUCKET = 16
PROMPTS, SHORT_PROMPT = 4, 64  # one call prefills up to so many prompts that are no longer than this
SMALLEST_VISIBLE = 64


class SlotPrograms:
    """`slots` rows of `capacity` tokens, rounded up to a multiple of the devices; slots 0 .. per_device - 1 are on the
    first device, and so on. `room`: the tokens of one decode call."""

    def __init__(
        self,
        model: Any,
        config: Any,
        slots: int,
        capacity: int,
        room: int,
        logprobs: bool,
        devices: Sequence[Any] | None,
    ):
        self.mesh = sharding.make_mesh(list(devices)) if devices is not None and len(devices) > 1 else None
        self.devices = self.mesh.size if self.mesh is not None else 1
        self.slots = _round_up(slots, self.devices)
        self.per_device = self.slots // self.devices
        self.room, self.capacity = room, capacity
        self._model, self._config, self._logprobs = model, config, logprobs
        # Every slot is a little longer than promised: padding of a prefill chunk and unused columns of a decode call
        # are written too, and XLA would move such a write back over valid tokens rather than let it overhang.
        self._physical = max(_round_up(capacity, SMALLEST_VISIBLE), capacity + max(room, SMALLEST_BUCKET))
        shape = config.n_layer, self.slots, config.n_kv_head, self._physical, config.head_dim, config.dtype
        place = None if self.mesh is None else sharding.named(self.mesh, sharding.rows_over_data_spec())
        self.storage = KVSlots.create(*shape, sharding=place)
        platform = devices[0].platform if devices else jax.default_backend()
        self._in_place = reads_in_place(config.dtype, platform)

    def set_params(self, params: Any) -> None:
        """New parameters, cast and placed once: matmuls would cast the weights for every token."""
        dtype = self._config.dtype
        cast = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 and dtype != np.float32 else x, params)
        if self.mesh is not None:
            cast = jax.device_put(cast, sharding.named(self.mesh, sharding.replicated_spec()))
        self.params = cast

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first tokens of a slot into another one of the same device."""
        pair = np.zeros((self.devices, 2), np.int32)
        pair[target // self.per_device] = source % self.per_device, target % self.per_device
        self.storage = decode.copy_row(self.storage, pair, visible=self._visible(tokens), mesh=self.mesh)

    def joins(self, turn: Sequence[tuple[int, int, int]], slot: int, begin: int, left: int) -> bool:
        """Whether a prompt may be prefilled in one call with those of `turn`: (slot, how much of it is there, how many
        tokens are to come).

        Any may, if there is one on each device; else those that would go through the same program alone, up to
        `_at_once` on a device.
        """
        devices = [other // self.per_device for other, *_ in turn]
        mine = devices.count(slot // self.per_device)
        if mine == 0 and len(set(devices)) == len(devices):
            return True
        length, visible = self._chunk(begin, left)
        return mine < self._at_once(length) and all(self._chunk(*other) == (length, visible) for _, *other in turn)

    def _chunk(self, begin: int, left: int) -> tuple[int, int]:
        """A prompt's next chunk: how long it is, and how many old tokens it may look at."""
        return min(_bucket(min(PREFILL_CHUNK, left)), self._longest(begin)), self._visible_to_prompts(begin)

    def _longest(self, begin: int) -> int:
        """The longest chunk that does not overhang the slot's end: a power of two."""
        return 1 << ((self._physical - begin).bit_length() - 1)

    def _at_once(self, length: int) -> int:
        """Prompts of one device that are prefilled in one call, where it takes `length` tokens of each."""
        return min(PROMPTS, self.per_device) if length <= SHORT_PROMPT else 1

    def prefill(self, turn: Sequence[tuple[int, int, Sequence[int]]]) -> tuple[int, list[int]]:
        """One chunk of each of some prompts that `joins` lets together: (slot, how much of it is there, the tokens to
        come).

        Returns what it cost, in tokens of a device, and how many tokens of each were taken.
        """
        chunks = [self._chunk(begin, len(tokens)) for _, begin, tokens in turn]
        visible = max(visible for _, visible in chunks)
        length = min(max(n for n, _ in chunks), *(self._longest(begin) for _, begin, _ in turn))
        ids = np.zeros((self.devices, self._at_once(length), length), np.int32)
        where = np.zeros((self.devices, self._at_once(length), 3), np.int32)
        filled = [0] * self.devices
        taken = []
        for slot, begin, tokens in turn:
            device, place = divmod(slot, self.per_device)
            row = filled[device]
            filled[device] += 1
            taken.append(min(length, len(tokens)))
            ids[device, row, : taken[-1]] = tokens[: taken[-1]]
            where[device, row] = place, begin, 1
        self._prefill(ids.reshape(-1, length), where.reshape(-1, 3), visible)
        return length * max(filled), taken

    def _prefill(self, ids: np.ndarray, where: np.ndarray, visible: int) -> None:
        self.storage = decode.prefill(
            self._model, self._config, self.params, self.storage, ids, where, visible=visible, mesh=self.mesh
        )

    def choose(self, slots: Sequence[int]) -> np.ndarray:
        """The slots that a call decodes, (devices, B) numbered on their device: those wanted, and as many others as
        make B one of the few sizes there are programs for."""
        wanted: list[list[int]] = [[] for _ in range(self.devices)]
        for slot in slots:
            wanted[slot // self.per_device].append(slot % self.per_device)
        size = next(size for size in self.batch_sizes() if size >= max(map(len, wanted)))
        if size == self.per_device:
            return np.tile(np.arange(size, dtype=np.int32), (self.devices, 1))
        others = ([slot for slot in range(self.per_device) if slot not in used] for used in wanted)
        return np.array([(mine + rest)[:size] for mine, rest in zip(wanted, others, strict=True)], np.int32)

    def batch_sizes(self) -> list[int]:
        """Rows that a decode call may have on each device: powers of four, and all."""
        sizes = itertools.takewhile(lambda size: size < self.per_device, (4**i for i in itertools.count()))
        return [*sizes, self.per_device]

    def decode(
        self, chosen: np.ndarray, rows: np.ndarray, shared: np.ndarray, longest: int, meanwhile: Callable[[], None]
    ) -> np.ndarray:
        """One call over the chosen slots, of which the longest that matters holds `longest` tokens.

        rows and shared as `decode.decode` wants them; returns what that does, one row per device. meanwhile: called
        while the device is at work.
        """
        packed = self._decode(chosen, rows, shared, self._visible_to_rows(longest))
        meanwhile()
        return np.asarray(packed).reshape(self.devices, -1)

    def _decode(self, chosen, rows, shared, visible: int) -> jax.Array:
        packed, self.storage = decode.decode(
            self._model, self._config, self.params, self.storage, chosen.ravel(), rows, shared,
            visible=visible, room=self.room, logprobs=self._logprobs, in_place=self._in_place, mesh=self.mesh,
        )  # fmt: skip
        return packed

    def _visible(self, tokens: int) -> int:
        """How many old positions a call looks at: powers of two, so that there are few programs."""
        if tokens == 0:
            return 0
        return min(max(SMALLEST_VISIBLE, 1 << (tokens - 1).bit_length()), _round_up(self.capacity, SMALLEST_VISIBLE))

    def _visible_to_rows(self, tokens: int) -> int:
        """The same for a decode call. What is read in place is read only as far as it is valid: one program does."""
        return self._visible(self.capacity if self._in_place else tokens)

    def _visible_to_prompts(self, tokens: int) -> int:
        """The same for a prompt's chunk, of which there are programs for each length too: powers of four."""
        visible = self._visible(tokens)
        odd = visible.bit_length() % 2 == 0
        return self._visible(2 * visible) if visible and odd else visible

    def warm_up(self, progress: Callable[[int, int], None]) -> int:
        """Compiles every program there can be need for, overwriting what the slots hold; returns how many."""
        sizes = sorted({self._visible(n) for n in range(self.capacity + 1)})
        lengths = sorted({_bucket(n) for n in range(1, min(PREFILL_CHUNK, max(1, self.capacity - 1)) + 1)})
        beginnings = sorted({self._visible_to_prompts(n) for n in range(self.capacity)})
        chunks = [(v, n) for v in beginnings for n in lengths if n <= self._physical]
        batches = [np.tile(np.arange(n, dtype=np.int32), self.devices) for n in self.batch_sizes()]
        decoded = sorted({self._visible_to_rows(n) for n in range(self.capacity + 1)})
        total, done = len(sizes) + len(decoded) * len(batches) + len(chunks), itertools.count(1)
        progress(0, total)
        before = decode.compiled_programs()
        shared = np.zeros((self.devices, decode.N_SHARED + 2), np.int32)
        for visible in sizes:
            self.storage = decode.copy_row(
                self.storage, np.zeros((self.devices, 2), np.int32), visible=visible, mesh=self.mesh
            )
            progress(next(done), total)
        for visible in decoded:
            for chosen in batches:
                self._decode(chosen, np.zeros((chosen.size, decode.N_COLUMNS + self.room), np.int32), shared, visible)
                progress(next(done), total)
        for visible, length in chunks:
            rows = self.devices * self._at_once(length)
            self._prefill(np.zeros((rows, length), np.int32), np.zeros((rows, 3), np.int32), visible)
            progress(next(done), total)
        return decode.compiled_programs() - before


def _bucket(n: int) -> int:
    return max(SMALLEST_BUCKET, 1 << (n - 1).bit_length())


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
