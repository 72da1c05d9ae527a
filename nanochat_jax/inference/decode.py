"""The engine's compiled programs: prefill a slot, copy a slot, decode all slots.

Parameters are an argument, the storage is donated, and everything about a row travels in one small int32 matrix made by
the host for each call, so requests come and go without anything on the device changing shape. Static, and so a
compilation each: the model, the number of positions made visible and the length of a prefill chunk, both rounded up to
a few buckets.

With a mesh, the slots are dealt to its devices and every device runs the program on its own, with no communication: it
prefills a row of its own, and its decode loop ends when its own rows want it to. What is per device has a leading axis
of that length; without a mesh that length is 1.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.inference.sampling import sample, uniforms
from nanochat_jax.model.kv_cache import KVSlots
from nanochat_jax.parallel import sharding

# columns of the row matrix; forced tokens follow
TOKEN, POSITION, COUNT, SEED, STREAM, TEMPERATURE, TOP_K, TOP_P, STOPS, REMAINING, N_FORCED, N_COLUMNS = range(12)
STOP_AT_END, STOP_AT_TOOL = 1, 2  # bits of STOPS
ENDLESS = 2**30  # REMAINING of a row nobody waits for
# columns of `shared`; end tokens (-1 = none) follow
STEPS, ENOUGH, TOOL, N_SHARED = range(4)


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

    where (devices * R, 3) int32, for each row: the slot, numbered on its device, its first free position, and 1; or 0
    for a row that is not there, after those of its device that are. One row is computed after the other: so what
    becomes of it does not depend on the others, and a call is worth its while all the same. What is padding at the end
    of ids lands beyond the length the caller keeps, and is overwritten later.
    """
    keys, values = _compute(model, config, params, slots, ids, where, visible, mesh)
    return _write(slots, keys, values, where, mesh)


def _on_each(mesh: Mesh | None, body, whole: int, dealt: int):
    """`body`, on every device of the mesh with its part: first come `whole` replicated arguments, then `dealt` ones."""
    if mesh is None:
        return body
    all_of_it, rows = sharding.replicated_spec(), sharding.rows_spec()
    specs = (all_of_it,) * whole + (rows,) * dealt
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)


# Two programs: in one, XLA would copy the storage of every layer whose write does not depend on the last read of it.
@functools.partial(jax.jit, static_argnames=("model", "config", "visible", "mesh"))
def _compute(model, config, params, slots, ids, where, visible, mesh):
    def body(params, slots, ids, where):
        def row(i, new):
            view = slots.view(where[i, 1][None], visible, ids.shape[1], slot=where[i, 0])
            _, cache = model.forward_cached(config, params, ids[i][None], view)
            return jax.tree.map(
                lambda buffer, part: jax.lax.dynamic_update_slice(buffer, part, (i * len(part), 0, 0)),
                new,
                (cache.new_keys, cache.new_values),
            )

        return jax.lax.fori_loop(0, where[:, 2].sum(), row, slots.buffers(*ids.shape))

    return _on_each(mesh, body, 1, 3)(params, slots, ids, where)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("slots",))
def _write(slots, keys, values, where, mesh):
    def body(slots, keys, values, where):
        def put(i, slots):
            return slots.write(slots.row(keys, i), slots.row(values, i), where[i, 1][None], where[i, 0])

        return jax.lax.fori_loop(0, where[:, 2].sum(), put, slots)

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
    static_argnames=("model", "config", "visible", "room", "logprobs", "in_place", "mesh"),
    donate_argnames=("slots",),
)
def decode(
    model: Any,
    config: Any,
    params: Any,
    slots: KVSlots,
    chosen: jax.Array,
    rows: jax.Array,
    shared: jax.Array,
    visible: int,
    room: int,
    logprobs: bool = False,
    in_place: bool = False,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, KVSlots]:
    """Up to `room` tokens for B rows, one at a time: feed the row's last token, sample (or force) the next.

    chosen (B,) int32: the slot of each row, numbered on its device, no slot twice. rows (B, N_COLUMNS + room) int32 as
    laid out above (temperature and top_p as float32 bits), the forced tokens last; B is dealt to the devices evenly.
    shared (devices, N_SHARED + E) int32: steps to do (at most room), how many rows must have stopped for the call to
    end (0: do nothing), the tool token, the end tokens (-1 = none). A row has stopped once it produced a token it is to
    stop at or has no tokens REMAINING; until the call ends it produces more, which the caller drops.

    Returns, per device, (B * room + 1,) int32, the tokens row by row and the number of steps done, one after the other,
    and the storage. With `logprobs` (2 * B * room + 1,): after the tokens come the float32 bits of their
    log-probabilities under the model (temperature 1, no top-k), row by row.
    """
    body = functools.partial(_decode, model, config, visible, room, logprobs, in_place)
    return _on_each(mesh, body, 1, 4)(params, slots, chosen, rows, shared)


def _decode(model, config, visible, room, logprobs, in_place, params, slots, chosen, rows, shared):
    B = rows.shape[0]
    # all of them, in order as the engine gives them: then nothing needs to be gathered
    places = None if B == slots.keys[0].shape[0] else chosen
    steps, enough, tool, ends = shared[0, STEPS], shared[0, ENOUGH], shared[0, TOOL], shared[0, N_SHARED:]
    temperature, top_p = (jax.lax.bitcast_convert_type(rows[:, c], jnp.float32) for c in (TEMPERATURE, TOP_P))
    random = jax.lax.cond((temperature > 0).any(), lambda: _random(rows, room), lambda: jnp.zeros((room, B, 2)))

    def going(carry):
        i, *_, stopped = carry
        return (i < steps) & (stopped.sum() < enough)

    def step(carry):
        i, token, cache, out, chances, stopped = carry
        hidden, cache = model.forward_cached(config, params, token[:, None], cache)
        logits = model.unembed(config, params, hidden[:, 0])
        token = sample(logits, temperature, rows[:, TOP_K], top_p, random[i])
        forced = jax.lax.dynamic_index_in_dim(rows, N_COLUMNS + i, axis=1, keepdims=False)
        token = jnp.where(i < rows[:, N_FORCED], forced, token)
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, i))
        if logprobs:
            chance = jnp.take_along_axis(logits, token[:, None], axis=1) - jax.nn.logsumexp(logits, axis=1)[:, None]
            chances = jax.lax.dynamic_update_slice(chances, chance, (0, i))
        at_end = (token[:, None] == ends[None]).any(-1) & (rows[:, STOPS] & STOP_AT_END > 0)
        at_tool = (token == tool) & (rows[:, STOPS] & STOP_AT_TOOL > 0)
        stopped |= at_end | at_tool | (i + 1 >= rows[:, REMAINING])
        return i + 1, token, cache.advance(1), out, chances, stopped

    view = slots.view(rows[:, POSITION], visible, room, slots=places, in_place=in_place)
    if view.places is not None:
        view = replace(view, places=jnp.where(rows[:, REMAINING] == ENDLESS, -1, view.places))
    start = jnp.zeros((), jnp.int32), rows[:, TOKEN], view
    outputs = jnp.zeros((B, room), jnp.int32), jnp.zeros((B, room if logprobs else 0), jnp.float32)
    done, _, cache, out, chances, _ = jax.lax.while_loop(going, step, (*start, *outputs, jnp.zeros((B,), bool)))
    bits = jax.lax.bitcast_convert_type(chances, jnp.int32)
    return jnp.concatenate([out.ravel(), bits.ravel(), done[None]]), slots.commit(cache, slots=places)


def _random(rows, room):
    """The random numbers of all steps of a call, (room, B, 2)."""
    count = rows[None, :, COUNT] + jnp.arange(room)[:, None]
    seed, stream = (jnp.broadcast_to(rows[None, :, c], count.shape).ravel() for c in (SEED, STREAM))
    return uniforms(seed.astype(jnp.uint32), stream, count.ravel()).reshape(room, -1, 2)


def float_bits(value: float) -> int:
    """A float32's bits as the int32 that carries it in the row matrix."""
    return int(np.float32(value).view(np.int32))


def compiled_programs() -> int:
    """How many engine programs this process has compiled: constant while an engine that was warmed up serves."""
    programs: tuple[Any, ...] = _compute, _write, copy_row, decode
    return sum(program._cache_size() for program in programs)
