"""The KV cache of the decoder: fixed slots, every row at its own position, nothing large ever copied.

Two objects. `KVSlots` is the storage that lives as long as the engine: per layer one (B, G, S, D) array of keys and one
of values, one row per slot. `KVCache` is what a forward pass sees: the part of the storage that can matter, read-only,
and a small buffer for the tokens of this call, which all rows fill in lockstep. `KVSlots.view` opens one, the model
appends to it as often as it likes, `KVSlots.commit` writes the buffer back, each row at its own position.

Why not write every token straight into the storage, as on a GPU (`kv_in_place`): rows at different positions make that
write a scatter, which XLA on CPU runs as a loop over rows, and where it reads all of what was just written it copies
the whole storage (measured on 2 cores, one row of 2 heads of 128: 1.25 ms a layer and token at 2048 positions, of which
0.15 ms are attention).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from nanochat_jax.hardware import cpu_kernels


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values a forward pass attends to: `b` rows, up to `visible` old tokens and a buffer for new ones.

    Per layer: old_keys, old_values (b * G, visible, D) or None where nothing old is visible; new_keys, new_values
    (b * G, buffer, D): rows and heads are merged because XLA keeps two copies of a buffer that is updated in one shape
    and multiplied in another. Row r holds start[r] old tokens, then `filled` new ones, the same number for every row;
    of the old ones a layer's arrays hold those before position start[r] that fit, from index 0 on (layers with a
    window have room for no more than it). Entries beyond are masked, never read as content.

    storage_rows (b,) int32: the old arrays are a whole storage (B * G, S, D), of which row r is storage_rows[r], or -1:
    the row is unused, so what is read for it does not matter; None: they hold these rows alone, in order. previous (b,)
    int32: the id of each row's last old token, -1 where there is none; new_ids (b, buffer) int32: those of the new
    ones. `capacity` bounds every position (it sizes the rotary tables).
    """

    old_keys: list[jax.Array] | None
    old_values: list[jax.Array] | None
    new_keys: list[jax.Array]
    new_values: list[jax.Array]
    start: jax.Array
    filled: jax.Array
    previous: jax.Array
    new_ids: jax.Array
    capacity: int = field(metadata=dict(static=True))
    storage_rows: jax.Array | None = None

    @classmethod
    def create(cls, n_layer: int, rows: int, n_kv_head: int, capacity: int, head_dim: int, dtype) -> "KVCache":
        """An empty stand-alone cache: `rows` rows that advance in lockstep, up to `capacity` tokens each."""
        shape, zeros = (rows, n_kv_head, capacity, head_dim), jnp.zeros((rows,), jnp.int32)
        return _open(n_layer, shape, dtype, None, None, zeros, zeros - 1, capacity)

    @property
    def position(self) -> jax.Array:
        """(b,) int32: how many tokens of each row the model has seen, so the position of its next one."""
        return self.start + self.filled

    @property
    def last_ids(self) -> jax.Array:
        """(b,) int32: the token before the next one of each row, -1 where there is none."""
        newest = jax.lax.dynamic_index_in_dim(self.new_ids, jnp.maximum(self.filled - 1, 0), axis=1, keepdims=False)
        return jnp.where(self.filled > 0, newest, self.previous)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, layer: int, window: int | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Attention of T new tokens per row against the cached ones and themselves, causal by absolute position.

        q (b, T, H, D), k and v (b, T, G, D); returns (b, T, H, D) and the layer's updated buffers (keys, values).
        Query t of row r sits at position p = self.position[r] + t and sees keys max(0, p - window) .. p. One token per
        row in float32 on CPU is left to a kernel of our own (`rustbpe/src/cpu_kernels/attend.rs`): XLA multiplies a
        row's tiny matrices one after the other and looks at all that a row might hold (0.15 ms a layer for 32 rows of 2
        heads and 128 tokens, of which the kernel needs a tenth).
        """
        b, T, H, D = q.shape
        G = k.shape[2]
        dtype = self.new_keys[layer].dtype

        def append(buffer, new):
            new = new.astype(dtype).swapaxes(1, 2).reshape(b * G, T, D)
            return jax.lax.dynamic_update_slice(buffer, new, (0, self.filled, 0))

        new_keys, new_values = append(self.new_keys[layer], k), append(self.new_values[layer], v)
        q = q.reshape(b, T, G, H // G, D).swapaxes(1, 2).reshape(b * G, T * H // G, D)
        old = None
        if self.old_keys is not None and self.old_values is not None:
            old = self.old_keys[layer], self.old_values[layer], self.storage_rows
        # Counted within the old arrays: those of a layer with a window hold only a row's last tokens.
        start = self.start if old is None else jnp.minimum(self.start, old[0].shape[1])
        arguments = q, old, (new_keys, new_values), start, self.filled
        formula = functools.partial(_attend, (b, T, H, G, D), window)
        if T == 1 and q.dtype == dtype == jnp.float32 and cpu_kernels.available("decode_attention"):
            y = jax.lax.platform_dependent(*arguments, cpu=functools.partial(_kernel, window), default=formula)
        else:
            y = formula(*arguments)
        return y.reshape(b, G, T, H // G, D).swapaxes(1, 2).reshape(b, T, H, D), (new_keys, new_values)

    def append(self, ids: jax.Array, keys_values: list[tuple[jax.Array, jax.Array]]) -> "KVCache":
        """The cache with these tokens (b, T) in its buffers; of each layer `attend` returned them."""
        new_ids = jax.lax.dynamic_update_slice(self.new_ids, ids.astype(jnp.int32), (0, self.filled))
        keys, values = [k for k, _ in keys_values], [v for _, v in keys_values]
        return replace(self, new_keys=keys, new_values=values, new_ids=new_ids)

    def advance(self, n: int | jax.Array) -> "KVCache":
        """Marks n more tokens of the buffer as valid, for all rows alike (n is a scalar)."""
        return replace(self, filled=self.filled + n)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVSlots:
    """The engine's storage: per layer keys and values (B, G, S, D), one row per slot. Donate it to every jitted call.

    It knows nothing about lengths: the engine does, and passes them in. What a row holds beyond its length is garbage
    that is overwritten before it becomes visible.
    """

    keys: list[jax.Array]
    values: list[jax.Array]

    @classmethod
    def create(
        cls, n_layer: int, rows: int, n_kv_head: int, capacity: int, head_dim: int, dtype, sharding=None
    ) -> "KVSlots":
        """Storage for `rows` rows of `capacity` tokens: 2 * n_layer * rows * n_kv_head * capacity * head_dim values."""

        def zeros():
            shape = (rows, n_kv_head, capacity, head_dim)
            return [jnp.zeros(shape, dtype, device=sharding) for _ in range(n_layer)]

        return cls(zeros(), zeros())

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def view(
        self,
        start: jax.Array,
        previous: jax.Array,
        visible: int,
        buffer: int,
        slot: jax.Array | None = None,
        slots: jax.Array | None = None,
        in_place: bool = False,
        windows: Sequence[int | None] | None = None,
    ) -> KVCache:
        """Opens all rows (or the one row `slot`, or the rows `slots` (b,) int32) for up to `buffer` more tokens.

        start (b,) int32 counts the valid tokens of each row, visible (static) must be at least the maximum of those
        that matter, and start + buffer must not exceed the capacity: XLA would clamp the later write silently, so the
        caller checks. previous (b,) int32: the id of each row's last token, -1 where it has none. windows: of each
        layer, so that no more than it is read. in_place: old tokens stay where they are, instead of being copied once
        for the whole call; a gain where our kernel reads them.
        """
        B, G, S, D = self.keys[0].shape
        rows = 1 if slot is not None else B if slots is None else slots.shape[0]
        old_keys = old_values = storage_rows = None
        if visible and in_place:
            old_keys, old_values = ([x.reshape(B * G, S, D) for x in xs] for xs in (self.keys, self.values))
            if slot is not None:
                storage_rows = slot[None]
            else:
                storage_rows = jnp.arange(B) if slots is None else slots
        elif visible:
            at = (0 if slot is None else slot, 0, 0, 0)
            rows_read = jnp.arange(B) if slots is None else slots
            if slot is not None:
                rows_read = slot[None]

            def old(storage, window):
                if window is not None and window < visible:  # each row's last ones alone
                    part = jax.vmap(lambda row, begin: _part(storage, row, begin, window))
                    return part(rows_read, jnp.maximum(start - window, 0)).reshape(rows * G, window, D)
                if slots is not None:
                    chosen = jnp.take(storage[:, :, :visible], slots, axis=0, mode="clip")
                else:
                    chosen = jax.lax.dynamic_slice(storage, at, (rows, G, visible, D))
                return chosen.reshape(rows * G, visible, D)

            windows = windows or [None] * len(self.keys)
            old_keys = [old(k, window) for k, window in zip(self.keys, windows, strict=True)]
            old_values = [old(v, window) for v, window in zip(self.values, windows, strict=True)]
        shape = rows, G, buffer, D
        cache = _open(len(self.keys), shape, self.keys[0].dtype, old_keys, old_values, start, previous, S)
        return replace(cache, storage_rows=storage_rows)

    def commit(self, cache: KVCache, slot: jax.Array | None = None, slots: jax.Array | None = None) -> "KVSlots":
        """Writes the whole buffer of a view, opened with the same `slot` or `slots`, after each row's old tokens.

        Columns never filled are written too; they lie beyond the row's length. In place where the storage is donated
        and everything that reads it comes before by necessity (a loop, or another program): else XLA copies it.
        """
        if slots is None:
            return self.write(cache.new_keys, cache.new_values, cache.start, slot)

        def put(i, storage: "KVSlots") -> "KVSlots":  # one row after the other: each must be a slot of its own
            keys, values = self.row(cache.new_keys, i), self.row(cache.new_values, i)
            return storage.write(keys, values, cache.start[i][None], slots[i])

        return jax.lax.fori_loop(0, slots.shape[0], put, self)

    def row(self, buffers: list[jax.Array], i: int | jax.Array) -> list[jax.Array]:
        """Row i of a cache's buffers (b * G, buffer, D): (G, buffer, D) of each layer."""
        G = self.keys[0].shape[1]
        return [jax.lax.dynamic_slice_in_dim(buffer, i * G, G) for buffer in buffers]

    def buffers(self, rows: int, buffer: int) -> tuple[list[jax.Array], list[jax.Array]]:
        """Empty buffers of a cache: keys and values (rows * G, buffer, D) of each layer."""
        _, G, _, D = self.keys[0].shape
        zeros = jnp.zeros((rows * G, buffer, D), self.keys[0].dtype)
        return [zeros] * len(self.keys), [zeros] * len(self.values)

    def write(self, keys, values, start: jax.Array, slot: jax.Array | None = None) -> "KVSlots":
        """As `commit`, given the buffers themselves."""

        def put(storage, new):
            _, G, _, D = storage.shape
            new = new.reshape(-1, G, new.shape[1], D)
            if slot is not None:
                at = (slot, 0, start[0], 0)
                return jax.lax.dynamic_update_slice(storage, new, at)
            return jax.vmap(lambda s, n, at: jax.lax.dynamic_update_slice(s, n, (0, at, 0)))(storage, new, start)

        return KVSlots(
            [put(s, n) for s, n in zip(self.keys, keys, strict=True)],
            [put(s, n) for s, n in zip(self.values, values, strict=True)],
        )

    def copy_row(self, source: jax.Array, target: jax.Array, visible: int) -> "KVSlots":
        """Copies the first `visible` tokens of one slot to another."""

        def copy(storage):
            _, G, _, D = storage.shape
            row = jax.lax.dynamic_slice(storage, (source, 0, 0, 0), (1, G, visible, D))
            return jax.lax.dynamic_update_slice(storage, row, (target, 0, 0, 0))

        return KVSlots([copy(k) for k in self.keys], [copy(v) for v in self.values])


def _part(storage, row, begin, length: int):
    """(G, length, D): the tokens of a row of the storage from `begin` on."""
    _, G, _, D = storage.shape
    return jax.lax.dynamic_slice(storage, (row, 0, begin, 0), (1, G, length, D))[0]


def _open(n_layer, shape, dtype, old_keys, old_values, start, previous, capacity) -> KVCache:
    rows, G, buffer, D = shape

    def zeros():
        return [jnp.zeros((rows * G, buffer, D), dtype) for _ in range(n_layer)]

    filled, new_ids = jnp.zeros((), jnp.int32), jnp.zeros((rows, buffer), jnp.int32)
    return KVCache(old_keys, old_values, zeros(), zeros(), start, filled, previous, new_ids, capacity)


def _kernel(window: int | None, q, old, new, start, filled) -> jax.Array:
    """The same as `_attend` for one token per row, as a custom call."""
    if old is None:
        old, start = (*new, None), jnp.zeros_like(start)  # none of it is valid
    keys, values, storage_rows = old
    storage_rows = jnp.arange(len(start)) if storage_rows is None else storage_rows
    width = jnp.int32(-1 if window is None else window)
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return jax.ffi.ffi_call("decode_attention", out)(q, keys, values, storage_rows, *new, start, filled, width)


def _attend(sizes, window: int | None, q, old, new, start, filled) -> jax.Array:
    """q (b * G, T * H / G, D) against old keys and values (B * G, S, D), of which row r is storage_rows[r] of B (or r,
    where that is None), and the call's buffers (b * G, buffer, D): the shape of q. start (b,): old tokens of each row
    in these arrays."""
    b, T, H, G, D = sizes
    new_keys, new_values = new
    if old is not None:
        *old, storage_rows = old
        if storage_rows is not None:  # a gather: XLA would make one even of the rows 0, 1, 2, ...
            whole = [x.reshape(-1, G, *x.shape[1:]) for x in old]
            old = [jnp.take(x, storage_rows, axis=0, mode="clip").reshape(b * G, *x.shape[2:]) for x in whole]

    def score(keys, visible):  # visible (b or 1, T, S), per row and query
        s = jax.lax.dot_general(q, keys, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        s = s.reshape(b, G, T, H // G, keys.shape[1]) / math.sqrt(D)
        return jnp.where(visible[:, None, :, None, :], s, -jnp.inf)

    def combine(weights, values):
        weights = weights.reshape(b * G, T * H // G, values.shape[1])
        return jax.lax.dot_general(weights, values, (((2,), (1,)), ((0,), (0,))))

    # the buffer: column j holds the j-th token of this call, in every row
    query = filled + jnp.arange(T)[:, None]
    column = jnp.arange(new_keys.shape[1])[None]
    visible = column <= query
    if window is not None:
        visible &= column >= query - window
    scores = score(new_keys, visible[None])
    n_old = 0
    if old is not None:
        n_old = old[0].shape[1]
        column = jnp.arange(n_old)[None, None]
        visible = jnp.broadcast_to(column < start[:, None, None], (b, T, n_old))
        if window is not None:
            visible &= column >= (start + filled)[:, None, None] + jnp.arange(T)[None, :, None] - window
        scores = jnp.concatenate([score(old[0], visible), scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(new_values.dtype)
    y = combine(weights[..., n_old:], new_values)
    if old is not None:
        y += combine(weights[..., :n_old], old[1])
    return y
