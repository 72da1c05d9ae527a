"""The compiled programs of the engine: pure functions `prefill`, `score`, `copy_row` and `decode`.

Parameters are an argument, the storage is donated, and everything about a row travels in one small int32 matrix made by
the host for each call, so requests come and go without anything on the device changing shape. Static, and so a
compilation each: the model, the number of positions made visible, the length of a prefill chunk and the number of rows,
all rounded up to a few buckets by `ModelRunner`, which calls them.

With a mesh, the slots are sharded over its devices and every device runs the program on its own, with no
communication: it prefills a row of its own, and its decode loop ends when its own rows want it to. What is per device
has a leading axis of that length; without a mesh that length is 1.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.inference import alternatives
from nanochat_jax.inference.logits import adjust, count
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.inference.sampling import sample, uniforms
from nanochat_jax.model.kv_cache import KVSlots
from nanochat_jax.model.kv_in_place import IN_PLACE, InPlaceCache
from nanochat_jax.parallel import sharding

# columns of the row matrix; forced tokens follow
(
    TOKEN, PREVIOUS, POSITION, COUNT, SEED, SAMPLE_INDEX, TOP_K, TEMPERATURE, TOP_P, MIN_P, REPETITION, FREQUENCY,
    PRESENCE, STOPS, REMAINING, N_FORCED, N_COLUMNS,
) = range(17)  # fmt: skip
_FRACTIONS = "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"
STOP_AT_END, STOP_AT_TOOL = 1, 2  # bits of STOPS
ENDLESS = 2**30  # REMAINING of a row that belongs to no request
# columns of the control matrix; end tokens (-1 = none) follow
STEPS, ENOUGH, TOOL, ADJUST, TOP, N_CONTROL = range(6)


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
            return _row(model, config, visible, params, slots, ids, where, i, new)[1]

        return jax.lax.fori_loop(0, where[:, 3].sum(), row, slots.buffers(*ids.shape))

    return _on_each(mesh, body, 1, 3)(params, slots, ids, where)


def _row(model, config, visible, params, slots, ids, where, i, new):
    """Hidden states (1, T, C) of row i of ids; its keys and values put into the buffers `new`."""
    slot, start, previous = where[i, 0], where[i, 1][None], where[i, 2][None]
    view = slots.view(start, previous, visible, ids.shape[1], slot=slot, windows=config.windows)
    hidden, cache = model.forward_cached(config, params, ids[i][None], view)

    def put(buffer, part):
        return jax.lax.dynamic_update_slice(buffer, part, (i * len(part), 0, 0))

    return hidden, jax.tree.map(put, new, (cache.new_keys, cache.new_values))


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("slots",))
def _write(slots, keys, values, where, mesh):
    def body(slots, keys, values, where):
        def put(i, slots):
            return slots.write(slots.row(keys, i), slots.row(values, i), where[i, 1][None], where[i, 0])

        return jax.lax.fori_loop(0, where[:, 3].sum(), put, slots)

    return _on_each(mesh, body, 0, 4)(slots, keys, values, where)


def score(
    model: Any,
    config: Any,
    params: Any,
    slots: KVSlots,
    ids: Any,
    targets: Any,
    where: Any,
    top: Any,
    visible: int,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, KVSlots]:
    """As `prefill`, and what is known of the tokens that follow: (devices * R, T, alternatives.WIDTH) int32.

    targets (devices * R, T) int32: the token after each of ids; top (devices,) int32: how many alternatives of it.
    """
    known, keys, values = _score(model, config, params, slots, ids, targets, where, top, visible, mesh)
    return known, _write(slots, keys, values, where, mesh)


@functools.partial(jax.jit, static_argnames=("model", "config", "visible", "mesh"))
def _score(model, config, params, slots, ids, targets, where, top, visible, mesh):
    def body(params, slots, ids, targets, where, top):
        def row(i, state):
            known, new = state
            hidden, new = _row(model, config, visible, params, slots, ids, where, i, new)
            about = alternatives.describe(model.unembed(config, params, hidden[0]), targets[i], top[0])
            return known.at[i].set(about), new

        start = jnp.zeros((*ids.shape, alternatives.WIDTH), jnp.int32), slots.buffers(*ids.shape)
        known, (keys, values) = jax.lax.fori_loop(0, where[:, 3].sum(), row, start)
        return known, keys, values

    return _on_each(mesh, body, 1, 5)(params, slots, ids, targets, where, top)


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
    static_argnames=("model", "config", "visible", "max_new_steps", "access", "mesh"),
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
    bias: jax.Array,
    seen: jax.Array,
    visible: int,
    max_new_steps: int,
    access: str = "copied",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array, KVSlots]:
    """Up to `max_new_steps` tokens for B rows, one at a time: feed the row's last token, sample (or force) the next.

    access: `kv_in_place.decode_access`. In place, all slots are decoded, in order, whatever they hold, and `visible` is
    the number of tokens that each is promised to hold.

    row_slots (B,) int32: the slot of each row, numbered on its device, no slot twice. rows (B, N_COLUMNS +
    max_new_steps) int32 as laid out above (fractions as float32 bits), the forced tokens last; B is sharded evenly over
    the devices. control (devices, N_CONTROL + E) int32: steps to do (at most max_new_steps), how many rows must have
    stopped for the call to end (0: do nothing), the tool token, whether any row has its logits adjusted, how many
    alternatives of each token are wanted (-1: nor its log-probability), the end tokens (-1 = none). bias, seen (B, V)
    float32, int32: of rows whose logits are adjusted (`logits.adjust`), else zeros, which are not read where no row's
    are. A row has stopped once it produced a token it is to stop at or has no tokens REMAINING; until the call ends it
    produces more, which the caller drops.

    Returns, per device, (B * max_new_steps + 1,) int32, the tokens row by row and the number of steps done, one after
    the other; (B, max_new_steps, alternatives.WIDTH) int32, what is known of each token (`alternatives`; zeros where
    nothing is wanted); and the storage.
    """
    body = functools.partial(_decode, model, config, visible, max_new_steps, access)
    return _on_each(mesh, body, 1, 6)(params, slots, row_slots, rows, control, bias, seen)


def _decode(model, config, visible, max_new_steps, access, params, slots, row_slots, rows, control, bias, seen):
    """`decode` on one device."""
    B = rows.shape[0]

    # 1. The control values of this call. Where all slots are decoded they come in order, and nothing is gathered.
    gathered = None if B == slots.keys[0].shape[0] else row_slots
    steps, enough, tool, adjusting, top, ends = *control[0, :N_CONTROL], control[0, N_CONTROL:]
    columns = jax.lax.bitcast_convert_type(rows[:, TEMPERATURE:STOPS], jnp.float32).T
    temperature, top_p, min_p, *penalties = (columns[i] for i in range(len(_FRACTIONS)))

    # 2. The random numbers of all steps at once; none where every row is greedy.
    random = jax.lax.cond(
        (temperature > 0).any(), lambda: _random(rows, max_new_steps), lambda: jnp.zeros((max_new_steps, B, 2))
    )

    # 3. Open the cache. Nothing is read for rows without a request.
    used = rows[:, REMAINING] != ENDLESS
    if access in IN_PLACE:  # the slots themselves, all of them
        state = rows[:, POSITION], rows[:, PREVIOUS], used
        cache: Any = InPlaceCache(slots.keys, slots.values, *state, visible, access)
    else:  # old tokens are read-only, new ones go to a buffer
        how: Any = dict(slots=gathered, in_place=access == "kernel", windows=config.windows)
        cache = slots.view(rows[:, POSITION], rows[:, PREVIOUS], visible, max_new_steps, **how)
        if cache.storage_rows is not None:
            cache = replace(cache, storage_rows=jnp.where(used, cache.storage_rows, -1))

    def going(carry):
        i, *_, stopped = carry
        return (i < steps) & (stopped.sum() < enough)

    def adjusted(logits, out, i):
        now = jax.lax.fori_loop(0, i, lambda j, now: count(now, out[:, j]), seen)
        return adjust(logits, bias, now, *penalties)

    def step(carry):
        i, token, cache, out, known, stopped = carry
        # 4a. Logits of the next token from the row's last one.
        hidden, cache = model.forward_cached(config, params, token[:, None], cache)
        unembed = functools.partial(model.unembed, config, params, hidden[:, 0])
        logits = jax.lax.cond(adjusting > 0, lambda: adjusted(unembed(), out, i), unembed)
        # 4b. Sample it, or take the one that the calculator's answer forces.
        token = sample(logits, temperature, rows[:, TOP_K], top_p, min_p, random[i])
        forced = jax.lax.dynamic_index_in_dim(rows, N_COLUMNS + i, axis=1, keepdims=False)
        token = jnp.where(i < rows[:, N_FORCED], forced, token)
        # 4c. Write it down, with its log-probability and alternatives if asked for.
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, i))

        def describe():  # the model's own logits: computed again where the others were adjusted
            own = jax.lax.cond(adjusting > 0, unembed, lambda: logits)
            return alternatives.describe(own, token, top)

        about = jax.lax.cond(top >= 0, describe, lambda: jnp.zeros((B, alternatives.WIDTH), jnp.int32))
        known = jax.lax.dynamic_update_slice(known, about[:, None], (0, i, 0))
        # 4d. Which rows have stopped: an end token, a tool call, or the last token asked for.
        at_end = (token[:, None] == ends[None]).any(-1) & (rows[:, STOPS] & STOP_AT_END > 0)
        at_tool = (token == tool) & (rows[:, STOPS] & STOP_AT_TOOL > 0)
        stopped |= at_end | at_tool | (i + 1 >= rows[:, REMAINING])
        return i + 1, token, cache.advance(1), out, known, stopped

    # 4. Decode until enough rows have stopped.
    start = jnp.zeros((), jnp.int32), rows[:, TOKEN], cache
    outputs = (jnp.zeros((B, max_new_steps, *more), jnp.int32) for more in ((), (alternatives.WIDTH,)))
    done, _, cache, out, known, _ = jax.lax.while_loop(going, step, (*start, *outputs, jnp.zeros((B,), bool)))

    # 5. One array for the host, another that it reads where it is wanted; the buffer behind each row's old tokens.
    slots = cache.slots if access in IN_PLACE else slots.commit(cache, slots=gathered)
    return jnp.concatenate([out.ravel(), done[None]]), known, slots


def _random(rows, max_new_steps):
    """The random numbers of all steps of a call, (max_new_steps, B, 2)."""
    count = rows[None, :, COUNT] + jnp.arange(max_new_steps)[:, None]
    seed, index = (jnp.broadcast_to(rows[None, :, c], count.shape).ravel() for c in (SEED, SAMPLE_INDEX))
    return uniforms(seed.astype(jnp.uint32), index, count.ravel()).reshape(max_new_steps, -1, 2)


def fractions(params: SamplingParams) -> np.ndarray:
    """The columns from TEMPERATURE to PRESENCE of a row: float32 bits as int32."""
    return np.array([getattr(params, name) for name in _FRACTIONS], np.float32).view(np.int32)


def compiled_programs() -> int:
    """How many engine programs this process has compiled: constant while an engine that was warmed up serves."""
    programs: tuple[Any, ...] = _compute, _score, _write, copy_row, decode
    return sum(program._cache_size() for program in programs)
