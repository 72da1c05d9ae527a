"""Cached decoding computes what the full forward computes: every shape, any chunking, rows at different positions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model import gpt
from nanochat_jax.model.config import MODERN
from nanochat_jax.model.kv_cache import KVCache, KVSlots
from nanochat_jax.model.kv_in_place import decode_access
from tests.toy_params import toy_params

SHAPES = {
    "mha": dict(n_head=4, n_kv_head=4),
    "gqa": dict(n_head=4, n_kv_head=2),
    "mqa": dict(n_head=4, n_kv_head=1),
    "windows": dict(n_head=4, n_kv_head=2, window_pattern="SSL", n_layer=3),
    "modern": dict(n_head=4, n_kv_head=2, n_layer=3) | MODERN | dict(window_pattern="SSL"),
}


def build(shape, **overrides):
    config = gpt.GPTConfig(
        **{**dict(sequence_len=512, vocab_size=97, n_layer=2, n_embd=32), **SHAPES[shape], **overrides}
    )
    return config, toy_params(config, 3)


def slots_for(config, rows, capacity):
    return KVSlots.create(config.n_layer, rows, config.n_kv_head, capacity, config.head_dim, jnp.float32)


forward = jax.jit(gpt.forward, static_argnums=0)
unembed = jax.jit(gpt.unembed, static_argnums=0)
forward_cached = jax.jit(gpt.forward_cached, static_argnums=0)
view = jax.jit(KVSlots.view, static_argnames=("visible", "buffer", "in_place", "windows"))
commit = jax.jit(KVSlots.commit)


def ids_for(config, rows, length, seed=0) -> Any:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length)).astype(np.int32)


@pytest.mark.parametrize("shape", [s if s != "mqa" else pytest.param(s, marks=pytest.mark.slow) for s in SHAPES])
def test_lockstep_cache_equals_forward(shape):
    """The window of the "S" layers is 128, so the chunks cross its edge at w-1, w, w+1 and 2w."""
    config, params = build(shape)
    ids = ids_for(config, 2, 258)
    expected = np.asarray(forward(config, params, ids))
    cache = KVCache.create(config.n_layer, 2, config.n_kv_head, 400, config.head_dim, jnp.float32)
    at = 0
    for T in (127, 1, 1, 1, 127, 1):
        hidden, cache = forward_cached(config, params, ids[:, at : at + T], cache)
        np.testing.assert_allclose(unembed(config, params, hidden), expected[:, at : at + T], atol=2e-5, rtol=1e-4)
        cache = cache.advance(T)
        at += T
    assert cache.position.tolist() == [at, at]


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in-place"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.slow
def test_slots_at_different_positions_equal_forward(shape, in_place):
    """Rows are prefilled one by one in padded chunks, then decoded together in calls of several steps, with reuse."""
    config, params = build(shape)
    rng = np.random.default_rng(1)
    slots = slots_for(config, 4, 384)
    lengths = np.zeros(4, np.int32)
    ids = ids_for(config, 4, 384)
    expected = np.array(forward(config, params, ids))  # causal: the logits of every prefix at once
    # garbage everywhere: what is beyond a row's length must not matter
    slots = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 100, x.dtype), slots)

    def before(rows):
        return jnp.array([ids[row, lengths[row] - 1] if lengths[row] else -1 for row in rows])

    def prefill(slots, row, n, pad):
        at = int(lengths[row])
        chunk = np.zeros((1, n + pad), np.int32)
        chunk[0, :n] = ids[row, at : at + n]
        how = dict(slot=jnp.int32(row), in_place=in_place, windows=config.windows)
        visible = -(-at // 64) * 64
        cache = view(slots, jnp.array([at]), before([row]), visible=visible, buffer=n + pad, **how)
        hidden, cache = forward_cached(config, params, chunk, cache)
        got = unembed(config, params, hidden)[0, :n]
        np.testing.assert_allclose(got, expected[row, at : at + n], atol=2e-5, rtol=1e-4)
        lengths[row] = at + n
        return commit(slots, cache, jnp.int32(row))

    def decode(slots, steps, buffer, rows=(0, 1, 2, 3)):
        visible = -(-int(lengths.max()) // 64) * 64
        rows = np.array(rows)
        some = None if len(rows) == 4 else jnp.asarray(rows)
        how = dict(slots=some, in_place=in_place, windows=config.windows)
        cache = view(slots, jnp.array(lengths[rows]), before(rows), visible=visible, buffer=buffer, **how)
        for _ in range(steps):
            tokens = ids[rows, lengths[rows]][:, None]
            hidden, cache = forward_cached(config, params, tokens, cache)
            got = unembed(config, params, hidden)[:, 0]
            np.testing.assert_allclose(got, expected[rows, lengths[rows]], atol=2e-5, rtol=1e-4)
            cache = cache.advance(1)
            lengths[rows] += 1
        return commit(slots, cache, slots=some)

    for row, n, pad in ((0, 5, 11), (1, 130, 0), (2, 64, 64), (1, 3, 13)):
        slots = prefill(slots, row, n, pad)
    slots = decode(slots, 3, 8)
    slots = decode(slots, 4, 4)
    slots = decode(slots, 2, 8, rows=(3, 1))
    lengths[1] = 0  # the slot is given to another request
    ids[1] = ids_for(config, 1, 384, seed=9)[0]
    expected[:] = forward(config, params, ids)
    slots = prefill(slots, 1, 17, 15)
    slots = decode(slots, 2, 8)
    slots = slots.copy_row(jnp.int32(2), jnp.int32(0), 128)
    lengths[0], ids[0], expected[0] = lengths[2], ids[2], expected[2]
    decode(slots, 2, 2)


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in-place"])
def test_storage_is_updated_in_place(in_place):
    """Donated storage aliases its result, and no program holds a second copy of it, even where all of it is visible."""
    config, _ = build("gqa")
    params = gpt.abstract(config)
    slots = jax.eval_shape(lambda: slots_for(config, 4, 8192))
    size = sum(x.size * 4 for x in jax.tree.leaves(slots))
    row = jax.ShapeDtypeStruct((4,), jnp.int32)

    def decode(params, slots, start):
        def body(_, carry):
            token, cache = carry
            hidden, cache = gpt.forward_cached(config, params, token[:, None], cache)
            return jnp.argmax(gpt.unembed(config, params, hidden[:, 0]), -1).astype(jnp.int32), cache.advance(1)

        start = jnp.zeros(4, jnp.int32), slots.view(start, start, 8192 if in_place else 128, 8, in_place=in_place)
        token, cache = jax.lax.fori_loop(0, 8, body, start)
        return token, slots.commit(cache)

    def write(params, slots, start):
        new = [jnp.zeros((config.n_kv_head, 16, config.head_dim))] * config.n_layer
        return slots.write(new, new, start[:1], start[0])

    def copy(params, slots, start):
        return slots.copy_row(start[0], start[1], 128)

    if in_place and decode_access(config, "cpu") != "kernel":
        pytest.skip("needs AVX2")
    for program in (decode, write, copy):
        memory: Any = jax.jit(program, donate_argnums=1).lower(params, slots, row).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= size
        assert memory.temp_size_in_bytes < size / 20


def test_bf16_storage_keeps_its_dtype():
    config, params = build("gqa")
    config = dataclasses.replace(config, compute_dtype="bfloat16")
    cache = KVCache.create(config.n_layer, 1, config.n_kv_head, 32, config.head_dim, jnp.bfloat16)
    hidden, cache = forward_cached(config, params, ids_for(config, 1, 8), cache)
    assert hidden.dtype == jnp.bfloat16 and {x.dtype for x in cache.new_keys} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_attention_gathers_nothing_where_the_rows_lie_in_order(platform):
    """A gather would copy all old keys and values, in every layer and for every token."""
    row = jnp.zeros(4, jnp.int32)
    cache = jax.eval_shape(lambda: slots_for(build("gqa")[0], 4, 256).view(row, row, 128, 8))
    q, kv = (jax.ShapeDtypeStruct((4, 1, heads, 8), jnp.float32) for heads in (4, 2))
    traced = jax.jit(lambda q, k, v, cache: cache.attend(q, k, v, 0, None)).trace(q, kv, kv, cache)
    assert "gather" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_window_saves_reads():
    """Where all that is visible is copied, a layer with a window copies no more than that."""
    config, _ = build("windows")
    row = jnp.zeros(4, jnp.int32)
    cache = jax.eval_shape(lambda: slots_for(config, 4, 512).view(row, row, 512, 8, windows=config.windows))
    assert [x.shape[1] for x in cache.old_keys] == [min(w, 512) for w in config.windows] == [128, 128, 512]
