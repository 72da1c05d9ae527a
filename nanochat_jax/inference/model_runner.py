"""The engine's device side: the slots' storage, the weights as they are multiplied, and the compiled programs.

`prefill`, `copy_row` and `decode` are pure functions. Parameters are an argument, the storage is donated, and
everything about a row travels in one small int32 matrix made by the host for each call, so requests come and go without
anything on the device changing shape. Static, and so a compilation each: the model, the number of positions made
visible, the length of a prefill chunk and the number of rows, all rounded up to a few buckets by `ModelRunner`, which
calls them.

With a mesh, the slots are sharded over its devices and every device runs the program on its own, with no
communication: it prefills a row of its own, and its decode loop ends when its own rows want it to. What is per device
has a leading axis of that length; without a mesh that length is 1.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.inference.sampling import sample, uniforms
from nanochat_jax.model.kv_cache import KVSlots, reads_in_place
from nanochat_jax.parallel import sharding

PREFILL_CHUNK = 512
SMALLEST_BUCKET = 16
PROMPTS, SHORT_PROMPT = 4, 64  # one call prefills up to so many prompts that are no longer than this
SMALLEST_VISIBLE = 64

# columns of the row matrix; forced tokens follow
(
    TOKEN, PREVIOUS, POSITION, COUNT, SEED, SAMPLE_INDEX, TEMPERATURE, TOP_K, TOP_P, STOPS, REMAINING, N_FORCED,
    N_COLUMNS,
) = range(13)  # fmt: skip
STOP_AT_END, STOP_AT_TOOL = 1, 2  # bits of STOPS
ENDLESS = 2**30  # REMAINING of a row that belongs to no request
# columns of the control matrix; end tokens (-1 = none) follow
STEPS, ENOUGH, TOOL, N_CONTROL = range(4)


def prefill(
    model: Any,
    config: Any,
    params: Any,
    slots: KVSlots,
    ids: Any,
    where: Any,
    visible: int,
    mesh: Mesh | None = None,
) -> KVSlots:
    """Writes keys and values of ids (devices * R, T) into R slots of each device. `slots` is donated.

    where (devices * R, 4) int32, for each row: the slot, numbered on its device, its first free position, the id of the
    token before it (-1: none), and 1; or 0 for padding rows, which come last on their device. Rows are computed one
    after the other, so results are batch-invariant; one call for several still saves what a call costs. Padding at the
    end of ids lands beyond the length that the caller keeps, and is overwritten later.
    """
    keys, values = _compute(model, config, params, slots, ids, where, visible, mesh)
    return _write(slots, keys, values, where, mesh)


def _on_each(mesh: Mesh | None, body, n_replicated: int, n_sharded: int):
    """`body` on every device of the mesh with its shard: replicated arguments come first, then sharded ones."""
    if mesh is None:
        return body
    replicated, rows = sharding.replicated_spec(), sharding.rows_spec()
    specs = (replicated,) * n_replicated + (rows,) * n_sharded
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)


# Two programs: in one, XLA would copy the storage of every layer whose write does not depend on the last read of it.
@functools.partial(jax.jit, static_argnames=("model", "config", "visible", "mesh"))
def _compute(model, config, params, slots, ids, where, visible, mesh):
    def body(params, slots, ids, where):
        def row(i, new):
            slot, start, previous = where[i, 0], where[i, 1][None], where[i, 2][None]
            view = slots.view(start, previous, visible, ids.shape[1], slot=slot, windows=config.windows)
            _, cache = model.forward_cached(config, params, ids[i][None], view)
            return jax.tree.map(
                lambda buffer, part: jax.lax.dynamic_update_slice(buffer, part, (i * len(part), 0, 0)),
                new,
                (cache.new_keys, cache.new_values),
            )

        return jax.lax.fori_loop(0, where[:, 3].sum(), row, slots.buffers(*ids.shape))

    return _on_each(mesh, body, 1, 3)(params, slots, ids, where)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("slots",))
def _write(slots, keys, values, where, mesh):
    def body(slots, keys, values, where):
        def put(i, slots):
            return slots.write(slots.row(keys, i), slots.row(values, i), where[i, 1][None], where[i, 0])

        return jax.lax.fori_loop(0, where[:, 3].sum(), put, slots)

    return _on_each(mesh, body, 0, 4)(slots, keys, values, where)


@functools.partial(jax.jit, static_argnames=("visible", "mesh"), donate_argnames=("slots",))
def copy_row(slots: KVSlots, source_target: jax.Array, visible: int, mesh: Mesh | None = None) -> KVSlots:
    """Copies the first `visible` tokens of one slot into another of the same device.

    source_target (devices, 2) int32, slots numbered on their device; twice the same slot changes nothing.
    """

    def body(slots, pair):
        return slots.copy_row(pair[0, 0], pair[0, 1], visible)

    return _on_each(mesh, body, 0, 2)(slots, source_target)


@functools.partial(
    jax.jit,
    static_argnames=("model", "config", "visible", "max_new_steps", "logprobs", "in_place", "mesh"),
    donate_argnames=("slots",),
)
def decode(
    model: Any,
    config: Any,
    params: Any,
    slots: KVSlots,
    row_slots: jax.Array,
    rows: jax.Array,
    control: jax.Array,
    visible: int,
    max_new_steps: int,
    logprobs: bool = False,
    in_place: bool = False,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, KVSlots]:
    """Up to `max_new_steps` tokens for B rows, one at a time: feed the row's last token, sample (or force) the next.

    row_slots (B,) int32: the slot of each row, numbered on its device, no slot twice. rows (B, N_COLUMNS +
    max_new_steps) int32 as laid out above (temperature and top_p as float32 bits), the forced tokens last; B is sharded
    evenly over the devices. control (devices, N_CONTROL + E) int32: steps to do (at most max_new_steps), how many rows
    must have stopped for the call to end (0: do nothing), the tool token, the end tokens (-1 = none). A row has stopped
    once it produced a token it is to stop at or has no tokens REMAINING; until the call ends it produces more, which
    the caller drops.

    Returns, per device, (B * max_new_steps + 1,) int32, the tokens row by row and the number of steps done, one after
    the other, and the storage. With `logprobs` (2 * B * max_new_steps + 1,): after the tokens come the float32 bits of
    their log-probabilities under the model (temperature 1, no top-k), row by row.
    """
    body = functools.partial(_decode, model, config, visible, max_new_steps, logprobs, in_place)
    return _on_each(mesh, body, 1, 4)(params, slots, row_slots, rows, control)


def _decode(model, config, visible, max_new_steps, logprobs, in_place, params, slots, row_slots, rows, control):
    """`decode` on one device."""
    B = rows.shape[0]

    # 1. The control values of this call. Where all slots are decoded they come in order, and nothing is gathered.
    gathered = None if B == slots.keys[0].shape[0] else row_slots
    steps, enough, tool, ends = control[0, STEPS], control[0, ENOUGH], control[0, TOOL], control[0, N_CONTROL:]
    temperature, top_p = (jax.lax.bitcast_convert_type(rows[:, c], jnp.float32) for c in (TEMPERATURE, TOP_P))

    # 2. The random numbers of all steps at once; none where every row is greedy.
    random = jax.lax.cond(
        (temperature > 0).any(), lambda: _random(rows, max_new_steps), lambda: jnp.zeros((max_new_steps, B, 2))
    )

    # 3. Open the cache: old tokens are read-only, new ones go to a buffer. Nothing is read for rows without a request.
    how: Any = dict(slots=gathered, in_place=in_place, windows=config.windows)
    view = slots.view(rows[:, POSITION], rows[:, PREVIOUS], visible, max_new_steps, **how)
    if view.storage_rows is not None:
        view = replace(view, storage_rows=jnp.where(rows[:, REMAINING] == ENDLESS, -1, view.storage_rows))

    def going(carry):
        i, *_, stopped = carry
        return (i < steps) & (stopped.sum() < enough)

    def step(carry):
        i, token, cache, out, chances, stopped = carry
        # 4a. Logits of the next token from the row's last one.
        hidden, cache = model.forward_cached(config, params, token[:, None], cache)
        logits = model.unembed(config, params, hidden[:, 0])
        # 4b. Sample it, or take the one that the calculator's answer forces.
        token = sample(logits, temperature, rows[:, TOP_K], top_p, random[i])
        forced = jax.lax.dynamic_index_in_dim(rows, N_COLUMNS + i, axis=1, keepdims=False)
        token = jnp.where(i < rows[:, N_FORCED], forced, token)
        # 4c. Write it down, with its log-probability if asked for.
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, i))
        if logprobs:
            chance = jnp.take_along_axis(logits, token[:, None], axis=1) - jax.nn.logsumexp(logits, axis=1)[:, None]
            chances = jax.lax.dynamic_update_slice(chances, chance, (0, i))
        # 4d. Which rows have stopped: an end token, a tool call, or the last token asked for.
        at_end = (token[:, None] == ends[None]).any(-1) & (rows[:, STOPS] & STOP_AT_END > 0)
        at_tool = (token == tool) & (rows[:, STOPS] & STOP_AT_TOOL > 0)
        stopped |= at_end | at_tool | (i + 1 >= rows[:, REMAINING])
        return i + 1, token, cache.advance(1), out, chances, stopped

    # 4. Decode until enough rows have stopped.
    start = jnp.zeros((), jnp.int32), rows[:, TOKEN], view
    outputs = jnp.zeros((B, max_new_steps), jnp.int32), jnp.zeros((B, max_new_steps if logprobs else 0), jnp.float32)
    done, _, cache, out, chances, _ = jax.lax.while_loop(going, step, (*start, *outputs, jnp.zeros((B,), bool)))

    # 5. One array for the host, and the buffer written behind each row's old tokens.
    bits = jax.lax.bitcast_convert_type(chances, jnp.int32)
    return jnp.concatenate([out.ravel(), bits.ravel(), done[None]]), slots.commit(cache, slots=gathered)


def _random(rows, max_new_steps):
    """The random numbers of all steps of a call, (max_new_steps, B, 2)."""
    count = rows[None, :, COUNT] + jnp.arange(max_new_steps)[:, None]
    seed, index = (jnp.broadcast_to(rows[None, :, c], count.shape).ravel() for c in (SEED, SAMPLE_INDEX))
    return uniforms(seed.astype(jnp.uint32), index, count.ravel()).reshape(max_new_steps, -1, 2)


def float_bits(value: float) -> int:
    """A float32's bits as the int32 that carries it in the row matrix."""
    return int(np.float32(value).view(np.int32))


def compiled_programs() -> int:
    """How many engine programs this process has compiled: constant while an engine that was warmed up serves."""
    programs: tuple[Any, ...] = _compute, _write, copy_row, decode
    return sum(program._cache_size() for program in programs)


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
        logprobs: bool,
        devices: Sequence[Any] | None,
    ):
        self.mesh = sharding.make_mesh(list(devices)) if devices is not None and len(devices) > 1 else None
        self.devices = self.mesh.size if self.mesh is not None else 1
        self.slots = _round_up(slots, self.devices)
        self.per_device = self.slots // self.devices
        self.max_new_steps, self.capacity = max_new_steps, capacity
        self._model, self._config, self._logprobs = model, config, logprobs
        # Every slot is a little longer than promised: padding of a prefill chunk and unused columns of a decode call
        # are written too, and XLA would move such a write back over valid tokens rather than let it overhang.
        self._physical = max(_round_up(capacity, SMALLEST_VISIBLE), capacity + max(max_new_steps, SMALLEST_BUCKET))
        shape = config.n_layer, self.slots, config.n_kv_head, self._physical, config.head_dim, config.dtype
        place = None if self.mesh is None else sharding.named(self.mesh, sharding.rows_over_data_spec())
        self.storage = KVSlots.create(*shape, sharding=place)
        platform = devices[0].platform if devices else jax.default_backend()
        self._in_place = reads_in_place(config.dtype, platform)

    def set_params(self, params: Any) -> None:
        """New parameters, cast and placed once: matmuls would cast the weights for every token. Vectors stay."""
        dtype = self._config.dtype
        cast = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 and x.ndim > 1 else x, params)
        if self.mesh is not None:
            cast = jax.device_put(cast, sharding.named(self.mesh, sharding.replicated_spec()))
        self.params = cast

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first tokens of a slot into another one of the same device."""
        pair = np.zeros((self.devices, 2), np.int32)
        pair[target // self.per_device] = source % self.per_device, target % self.per_device
        self.storage = copy_row(self.storage, pair, visible=self._visible(tokens), mesh=self.mesh)

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
        """Rows that a decode call may have on each device: powers of four, and all."""
        sizes = itertools.takewhile(lambda size: size < self.per_device, (4**i for i in itertools.count()))
        return [*sizes, self.per_device]

    def decode(
        self, batch: np.ndarray, rows: np.ndarray, control: np.ndarray, longest: int, meanwhile: Callable[[], None]
    ) -> np.ndarray:
        """One call over the slots of a `batch`, of which the longest that matters holds `longest` tokens.

        rows and control as the program `decode` takes them; returns what that does, one row per device. meanwhile:
        called while the device is at work.
        """
        packed = self._decode(batch, rows, control, self._visible_to_rows(longest))
        meanwhile()
        return np.asarray(packed).reshape(self.devices, -1)

    def _decode(self, batch, rows, control, visible: int) -> jax.Array:
        packed, self.storage = decode(
            self._model, self._config, self.params, self.storage, batch.ravel(), rows, control,
            visible=visible, max_new_steps=self.max_new_steps, logprobs=self._logprobs, in_place=self._in_place,
            mesh=self.mesh,
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
        before = compiled_programs()
        control = np.zeros((self.devices, N_CONTROL + 2), np.int32)
        for visible in sizes:
            pairs = np.zeros((self.devices, 2), np.int32)
            self.storage = copy_row(self.storage, pairs, visible=visible, mesh=self.mesh)
            progress(next(done), total)
        for visible in decoded:
            for batch in batches:
                rows = np.zeros((batch.size, N_COLUMNS + self.max_new_steps), np.int32)
                self._decode(batch, rows, control, visible)
                progress(next(done), total)
        for visible, length in chunks:
            n = self.devices * self._at_once(length)
            self._prefill(np.zeros((n, length), np.int32), np.zeros((n, 4), np.int32), visible)
            progress(next(done), total)
        return compiled_programs() - before


def _bucket(n: int) -> int:
    return max(SMALLEST_BUCKET, 1 << (n - 1).bit_length())


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
