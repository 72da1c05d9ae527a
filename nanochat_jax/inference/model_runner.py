"""The engine's device side: the slots' storage, the weights as they are multiplied, and calls of the compiled programs
(`programs`) in one of the few shapes that there are programs for."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nanochat_jax.inference import alternatives
from nanochat_jax.inference.programs import (
    N_COLUMNS,
    N_CONTROL,
    TOP,
    compiled_programs,
    copy_row,
    decode,
    prefill,
    score,
)
from nanochat_jax.model.joined_qkv import join_qkv
from nanochat_jax.model.kv_cache import KVSlots
from nanochat_jax.model.kv_in_place import IN_PLACE, decode_access
from nanochat_jax.parallel import sharding

PREFILL_CHUNK = 512
SMALLEST_BUCKET = 16
PROMPTS, SHORT_PROMPT = 4, 64  # one call prefills up to so many prompts that are no longer than this
SMALLEST_VISIBLE = 64
SCORED = 64  # tokens of a prompt whose log-probabilities are computed at once


def slot_length(capacity: int, max_new_steps: int) -> int:
    """Positions of a slot that is promised to hold `capacity` tokens.

    A little more: padding of a prefill chunk and unused columns of a decode call are written too, and XLA would move
    such a write back over valid tokens rather than let it overhang.
    """
    return _round_up(capacity + max(max_new_steps, SMALLEST_BUCKET), SMALLEST_VISIBLE)


def visible_positions(tokens: int, length: int) -> int:
    """How many old positions of slots of `length` a call looks at where they hold up to `tokens`: powers of two, so
    that there are few programs.

    A call copies what it looks at once (not where it reads in place), but the full length is the storage itself: from
    three quarters on it looks at that, so that no copy is larger.
    """
    if tokens == 0:
        return 0
    visible = max(SMALLEST_VISIBLE, 1 << (tokens - 1).bit_length())
    return length if 4 * visible > 3 * length else visible


def largest_copy(length: int) -> int:
    """The most positions of each slot of `length` that a decode call copies."""
    return max((v for v in (visible_positions(n, length) for n in range(1, length + 1)) if v < length), default=0)


class ModelRunner:
    """`slots` rows of `capacity` tokens, rounded up to a multiple of the devices; slots 0 .. per_device - 1 are on the
    first device, and so on. `max_new_steps`: the most tokens of one decode call."""

    def __init__(
        self,
        model: Any,
        config: Any,
        slots: int,
        capacity: int,
        max_new_steps: int,
        devices: Sequence[Any] | None,
    ):
        self.mesh = sharding.make_mesh(list(devices)) if devices is not None and len(devices) > 1 else None
        self.devices = self.mesh.size if self.mesh is not None else 1
        self.slots = _round_up(slots, self.devices)
        self.per_device = self.slots // self.devices
        self.max_new_steps, self.capacity = max_new_steps, capacity
        self._model, self._config = model, config
        self._physical = slot_length(capacity, max_new_steps)
        shape = config.n_layer, self.slots, config.n_kv_head, self._physical, config.head_dim, config.dtype
        place = None if self.mesh is None else sharding.named(self.mesh, sharding.rows_over_data_spec())
        self.storage = KVSlots.create(*shape, sharding=place)
        self._access = decode_access(config, devices[0].platform if devices else jax.default_backend())
        self._neutral: dict[int, tuple[jax.Array, jax.Array]] = {}  # by rows: what is given where nothing is adjusted

    @property
    def _few(self) -> bool:
        """Few programs: on a GPU each takes many seconds to compile, and rows more than needed cost little. One decodes
        all slots, whatever they hold."""
        return self._access in IN_PLACE

    def set_params(self, params: Any) -> None:
        """New parameters, cast, joined and placed once: matmuls would do so for every token. Vectors stay."""
        dtype = self._config.dtype
        cast = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 and x.ndim > 1 else x, params)
        if self._few:
            cast = join_qkv(cast)
        if self.mesh is not None:
            cast = jax.device_put(cast, sharding.named(self.mesh, sharding.replicated_spec()))
        self.params = cast

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first tokens of a slot into another one of the same device."""
        pair = np.zeros((self.devices, 2), np.int32)
        pair[target // self.per_device] = source % self.per_device, target % self.per_device
        self.storage = copy_row(self.storage, pair, visible=self._visible_to_copy(tokens), mesh=self.mesh)

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
        wanted = next(n for n in self._lengths() if n >= min(PREFILL_CHUNK, left))
        return min(wanted, self._longest(begin)), self._visible_to_prompts(begin)

    def _lengths(self) -> list[int]:
        """The lengths that a chunk may have: powers of two (few programs: of eight)."""
        every = 8 if self._few else 2
        return sorted({max(SMALLEST_BUCKET, PREFILL_CHUNK // every**i) for i in range(6)})

    def _longest(self, begin: int) -> int:
        """The longest chunk that does not overhang the slot's end."""
        return max(n for n in self._lengths() if n <= self._physical - begin)

    def _at_once(self, length: int) -> int:
        """Prompts of one device that are prefilled in one call, where it takes `length` tokens of each."""
        return min(PROMPTS, self.per_device) if length <= SHORT_PROMPT else 1

    def prefill(self, turn: Sequence[tuple[int, int, Sequence[int]]]) -> tuple[int, list[int]]:
        """One chunk of each of some prompts that `joins` lets together: (slot, how much of it is there, the prompt).
        The last token of a prompt is left to the first decode call.

        Returns what it cost, in tokens of a device, and how many tokens of each were taken.
        """
        chunks = [self._chunk(begin, len(prompt) - 1 - begin) for _, begin, prompt in turn]
        visible = max(visible for _, visible in chunks)
        length = min(max(n for n, _ in chunks), *(self._longest(begin) for _, begin, _ in turn))
        ids = np.zeros((self.devices, self._at_once(length), length), np.int32)
        where = np.zeros((self.devices, self._at_once(length), 4), np.int32)
        filled = [0] * self.devices
        taken = []
        for slot, begin, prompt in turn:
            device, local = divmod(slot, self.per_device)
            row = filled[device]
            filled[device] += 1
            taken.append(min(length, len(prompt) - 1 - begin))
            ids[device, row, : taken[-1]] = prompt[begin : begin + taken[-1]]
            where[device, row] = local, begin, prompt[begin - 1] if begin else -1, 1
        self._prefill(ids.reshape(-1, length), where.reshape(-1, 4), visible)
        return length * max(filled), taken

    def score(
        self, turn: Sequence[tuple[int, int, Sequence[int], int]]
    ) -> tuple[int, list[int], list[tuple[list[float], list]]]:
        """As `prefill`, for at most `PROMPTS` prompts of each device whose tokens' log-probabilities are wanted, with
        so many alternatives of each (the last of the tuple).

        Chunks are always of one length, so results depend on the prompt alone, and one program does. Returns as well
        (log-probabilities, alternatives) of the tokens that follow those taken.
        """
        n = min(PROMPTS, self.per_device)
        ids, targets = np.zeros((2, self.devices, n, SCORED), np.int32)
        where = np.zeros((self.devices, n, 4), np.int32)
        filled = [0] * self.devices
        taken, places = [], []
        for slot, begin, prompt, _ in turn:
            device, local = divmod(slot, self.per_device)
            row = filled[device]
            filled[device] += 1
            part = prompt[begin : begin + SCORED + 1]
            taken.append(len(part) - 1)
            places.append(device * n + row)
            ids[device, row, : taken[-1]], targets[device, row, : taken[-1]] = part[:-1], part[1:]
            where[device, row] = local, begin, prompt[begin - 1] if begin else -1, 1
        top = np.full(self.devices, max(own for *_, own in turn), np.int32)
        known = self._score([x.reshape(-1, x.shape[-1]) for x in (ids, targets, where)], top)
        found = zip(places, taken, turn, strict=True)
        return SCORED * max(filled), taken, [alternatives.read(known[row, :t], own) for row, t, (*_, own) in found]

    def _score(self, rows: Sequence[np.ndarray], top: np.ndarray) -> np.ndarray:
        """rows: ids, targets and where."""
        ids, targets, where = rows
        known, self.storage = score(
            self._model, self._config, self.params, self.storage, ids, targets, where, top,
            visible=self._visible(self.capacity), mesh=self.mesh,
        )  # fmt: skip
        return np.asarray(known)

    def _prefill(self, ids: np.ndarray, where: np.ndarray, visible: int) -> None:
        self.storage = prefill(
            self._model, self._config, self.params, self.storage, ids, where, visible=visible, mesh=self.mesh
        )

    def batch(self, slots: Sequence[int]) -> np.ndarray:
        """The slots that a call decodes, (devices, B) numbered on their device: those wanted, and as many others as
        make B one of the few batch sizes there are programs for."""
        wanted: list[list[int]] = [[] for _ in range(self.devices)]
        for slot in slots:
            wanted[slot // self.per_device].append(slot % self.per_device)
        size = next(size for size in self.batch_sizes() if size >= max(map(len, wanted)))
        if size == self.per_device:
            return np.tile(np.arange(size, dtype=np.int32), (self.devices, 1))
        others = ([slot for slot in range(self.per_device) if slot not in used] for used in wanted)
        return np.array([(mine + rest)[:size] for mine, rest in zip(wanted, others, strict=True)], np.int32)

    def batch_sizes(self) -> list[int]:
        """Rows that a decode call may have on each device: powers of four, and all (few programs: all)."""
        sizes = itertools.takewhile(lambda size: size < self.per_device, (4**i for i in itertools.count()))
        return [self.per_device] if self._few else [*sizes, self.per_device]

    def decode(
        self,
        batch: np.ndarray,
        rows: np.ndarray,
        control: np.ndarray,
        adjustments: tuple[np.ndarray, np.ndarray] | None,
        longest: int,
        meanwhile: Callable[[], None],
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """One call over the slots of a `batch`, of which the longest that matters holds `longest` tokens.

        rows, control, adjustments (bias and seen; None: no row's logits are adjusted) as the program `decode` takes
        them; returns the tokens, one row per device, and what is known of them if that is wanted. meanwhile: called
        while the device is at work.
        """
        packed, known = self._decode(batch, rows, control, adjustments, self._visible_to_rows(longest))
        meanwhile()
        wanted = control[0, TOP] >= 0
        return np.asarray(packed).reshape(self.devices, -1), np.asarray(known) if wanted else None

    def _decode(self, batch, rows, control, adjustments, visible: int) -> tuple[jax.Array, jax.Array]:
        packed, known, self.storage = decode(
            self._model, self._config, self.params, self.storage, batch.ravel(), rows, control,
            *(self._placed(*adjustments) if adjustments else self.nothing_adjusted(batch.size)),
            visible=visible, max_new_steps=self.max_new_steps, access=self._access, mesh=self.mesh,
        )  # fmt: skip
        return packed, known

    def nothing_adjusted(self, rows: int) -> tuple[jax.Array, jax.Array]:
        """Bias and seen of a call of so many rows (of all devices) none of whose logits are adjusted."""
        if rows not in self._neutral:
            shape = rows, self._config.vocab_size
            self._neutral[rows] = self._placed(np.zeros(shape, np.float32), np.zeros(shape, np.int32))
        return self._neutral[rows]

    def _placed(self, bias: np.ndarray, seen: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """On the devices, both kinds in one way: a program is told apart by where its arguments are, too."""
        place = None if self.mesh is None else sharding.named(self.mesh, sharding.rows_over_data_spec())
        return jax.device_put(bias, place), jax.device_put(seen, place)

    def _visible(self, tokens: int) -> int:
        return visible_positions(tokens, self._physical)

    def _visible_to_copy(self, tokens: int) -> int:
        return self._physical if self._few else self._visible(tokens)

    def _visible_to_rows(self, tokens: int) -> int:
        """The same for a decode call. What is not copied is read only as far as it is valid: one program does."""
        if self._few:
            return self.capacity
        return self._visible(tokens if self._access == "copied" else self.capacity)

    def _visible_to_prompts(self, tokens: int) -> int:
        """The same for a prompt's chunk, of which there are programs for each length too: powers of four (few programs:
        all or nothing)."""
        visible = self._visible(self.capacity if self._few and tokens else tokens)
        odd = visible.bit_length() % 2 == 0
        return self._visible(2 * visible) if visible and odd else visible

    def warm_up(self, progress: Callable[[int, int], None]) -> int:
        """Compiles every program there can be need for, overwriting what the slots hold; returns how many."""
        sizes = sorted({self._visible_to_copy(n) for n in range(self.capacity + 1)})
        longest = next(n for n in self._lengths() if n >= min(PREFILL_CHUNK, max(1, self.capacity - 1)))
        lengths = [n for n in self._lengths() if n <= longest]
        beginnings = sorted({self._visible_to_prompts(n) for n in range(self.capacity)})
        chunks = [(v, n) for v in beginnings for n in lengths if n <= self._physical]
        batches = [np.tile(np.arange(n, dtype=np.int32), self.devices) for n in self.batch_sizes()]
        decoded = sorted({self._visible_to_rows(n) for n in range(self.capacity + 1)})
        total, done = len(sizes) + len(decoded) * len(batches) + len(chunks) + 1, itertools.count(1)
        progress(0, total)
        before = compiled_programs()
        control = np.zeros((self.devices, N_CONTROL + 2), np.int32)
        for visible in sizes:
            pairs = np.zeros((self.devices, 2), np.int32)
            self.storage = copy_row(self.storage, pairs, visible=visible, mesh=self.mesh)
            progress(next(done), total)
        for visible in decoded:
            for batch in batches:
                rows = np.zeros((batch.size, N_COLUMNS + self.max_new_steps), np.int32)
                self._decode(batch, rows, control, None, visible)
                progress(next(done), total)
        for visible, length in chunks:
            n = self.devices * self._at_once(length)
            self._prefill(np.zeros((n, length), np.int32), np.zeros((n, 4), np.int32), visible)
            progress(next(done), total)
        n = self.devices * min(PROMPTS, self.per_device)
        scored = [np.zeros((n, width), np.int32) for width in (SCORED, SCORED, 4)]
        self._score(scored, np.zeros(self.devices, np.int32))
        progress(next(done), total)
        return compiled_programs() - before


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
