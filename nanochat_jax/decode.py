"""The engine's compiled programs: prefill a slot, copy a slot, decode all slots.

Parameters are an argument, the storage is donated, and everything about a row travels in one small int32 matrix made by
the host for each call, so requests come and go without anything on the device changing shape. Static, and so a
compilation each: the model, the number of positions made visible and the length of a prefill chunk, both rounded up to
a few buckets.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.kv_cache import KVSlots
from nanochat_jax.sampling import sample

# columns of the row matrix; forced tokens follow
TOKEN, POSITION, COUNT, SEED, STREAM, TEMPERATURE, TOP_K, STOPS, N_FORCED, N_COLUMNS = range(10)
STOP_AT_END, STOP_AT_TOOL = 1, 2  # bits of STOPS


def prefill(model: Any, config: Any, params: Any, slots: KVSlots, ids: Any, slot_start: Any, visible: int) -> KVSlots:
    """Writes keys and values of ids (1, T) into a slot. slot_start (2,) int32 is the slot and its first free position.

    What is padding at the end of ids lands beyond the length the caller keeps, and is overwritten later. `slots` is
    donated.
    """
    keys, values = _compute(model, config, params, slots, ids, slot_start, visible)
    return _write(slots, keys, values, slot_start)


# Two programs: in one, XLA would copy the storage of every layer whose write does not depend on the last read of it.
@functools.partial(jax.jit, static_argnames=("model", "config", "visible"))
def _compute(model, config, params, slots, ids, slot_start, visible):
    slot, start = slot_start
    _, cache = model.forward_cached(config, params, ids, slots.view(start[None], visible, ids.shape[1], slot))
    return cache.new_keys, cache.new_values


@functools.partial(jax.jit, donate_argnames=("slots",))
def _write(slots, keys, values, slot_start):
    slot, start = slot_start
    return slots.write(keys, values, start[None], slot)


@functools.partial(jax.jit, static_argnames=("visible",), donate_argnames=("slots",))
def copy_row(slots: KVSlots, source_target: jax.Array, visible: int) -> KVSlots:
    """Copies the first `visible` tokens of one slot into another; source_target (2,) int32."""
    return slots.copy_row(source_target[0], source_target[1], visible)


@functools.partial(
    jax.jit, static_argnames=("model", "config", "visible", "room", "logprobs"), donate_argnames=("slots",)
)
def decode(
    model: Any,
    config: Any,
    params: Any,
    slots: KVSlots,
    rows: jax.Array,
    shared: jax.Array,
    visible: int,
    room: int,
    logprobs: bool = False,
) -> tuple[jax.Array, KVSlots]:
    """Up to `room` tokens for every row, one at a time: feed the row's last token, sample (or force) the next.

    rows (B, N_COLUMNS + room) int32 as laid out above (temperature as its float32 bits), the forced tokens last. shared
    (2 + E,) int32: steps to do (at most room), the tool token, the end tokens (-1 = none). Stops early after the step
    in which a row produced a token it is to stop at; nothing sampled is lost. Returns (B * room + 1,) int32, the tokens
    row by row and the number of steps done, and the storage. With `logprobs` (2 * B * room + 1,): after the tokens come
    the float32 bits of their log-probabilities under the model (temperature 1, no top-k), row by row.
    """
    B = rows.shape[0]
    steps, tool, ends = shared[0], shared[1], shared[2:]
    temperature = jax.lax.bitcast_convert_type(rows[:, TEMPERATURE], jnp.float32)
    seed = rows[:, SEED].astype(jnp.uint32)

    def going(carry):
        i, *_, stopped = carry
        return (i < steps) & ~stopped

    def step(carry):
        i, token, cache, out, chances, _ = carry
        hidden, cache = model.forward_cached(config, params, token[:, None], cache)
        logits = model.unembed(config, params, hidden[:, 0])
        token = sample(logits, temperature, rows[:, TOP_K], seed, rows[:, STREAM], rows[:, COUNT] + i)
        forced = jax.lax.dynamic_index_in_dim(rows, N_COLUMNS + i, axis=1, keepdims=False)
        token = jnp.where(i < rows[:, N_FORCED], forced, token)
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, i))
        if logprobs:
            chance = jnp.take_along_axis(logits, token[:, None], axis=1) - jax.nn.logsumexp(logits, axis=1)[:, None]
            chances = jax.lax.dynamic_update_slice(chances, chance, (0, i))
        at_end = (token[:, None] == ends[None]).any(-1) & (rows[:, STOPS] & STOP_AT_END > 0)
        at_tool = (token == tool) & (rows[:, STOPS] & STOP_AT_TOOL > 0)
        return i + 1, token, cache.advance(1), out, chances, (at_end | at_tool).any()

    start = jnp.zeros((), jnp.int32), rows[:, TOKEN], slots.view(rows[:, POSITION], visible, room)
    outputs = jnp.zeros((B, room), jnp.int32), jnp.zeros((B, room if logprobs else 0), jnp.float32)
    done, _, cache, out, chances, _ = jax.lax.while_loop(going, step, (*start, *outputs, jnp.array(False)))
    bits = jax.lax.bitcast_convert_type(chances, jnp.int32)
    return jnp.concatenate([out.ravel(), bits.ravel(), done[None]]), slots.commit(cache)


def float_bits(value: float) -> int:
    """A float32's bits as the int32 that carries it in the row matrix."""
    return int(np.float32(value).view(np.int32))


def compiled_programs() -> int:
    """How many engine programs this process has compiled: constant while an engine that was warmed up serves."""
    programs: tuple[Any, ...] = _compute, _write, copy_row, decode
    return sum(program._cache_size() for program in programs)
