"""The cache of a decode call on an accelerator: the slots themselves, where every new token is written at once.

What `kv_cache` avoids on a CPU costs a GPU next to nothing: a write of one token to each row, every row at its own
position, is one small kernel. So nothing is copied for a call, and the lengths are data: one program serves them all.
"""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from nanochat_jax.hardware import cpu_kernels
from nanochat_jax.model.attention import choose_implementation
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.kv_cache import KVSlots

IN_PLACE = "cudnn", "xla"


def decode_access(config: GPTConfig, platform: str) -> str:
    """How a decode call gets at what the slots hold on devices of a platform.

    "copied": once for the whole call; "kernel": our kernel reads it where it lies; the others: it is the cache of the
    call (`InPlaceCache`), attention being cuDNN's, or XLA's where cuDNN cannot run.
    """
    if platform != "cpu":
        chosen, _ = choose_implementation(config.attention, jax.default_backend(), str(config.dtype), config.head_dim)
        return "cudnn" if chosen == "cudnn" else "xla"
    return "kernel" if config.dtype == jnp.float32 and cpu_kernels.available("decode_attention") else "copied"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InPlaceCache:
    """All B slots, each decoded one token at a time; a forward pass takes it as it takes a `KVCache`.

    keys, values: per layer (B, G, S, D), the storage. position, last_ids (B,) int32: tokens that each row holds, and
    the id of its last one (-1: none). used (B,) bool: rows that belong to a request; of the others nothing is read but
    one token, and what is computed for them does not matter. capacity: the tokens that a slot is promised to hold; what
    is beyond is part of no answer. implementation: "cudnn", or "xla" where that cannot run.
    """

    keys: list[jax.Array]
    values: list[jax.Array]
    position: jax.Array
    last_ids: jax.Array
    used: jax.Array
    capacity: int = field(metadata=dict(static=True))
    implementation: str = field(metadata=dict(static=True))

    @property
    def slots(self) -> KVSlots:
        """The storage, with everything that has been written."""
        return KVSlots(self.keys, self.values)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, layer: int, window: int | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """As `KVCache.attend`, for one token per row: q (B, 1, H, D), k and v (B, 1, G, D)."""
        B, _, G, D = k.shape
        rows = jnp.arange(B)

        def put(storage, new):
            exact = dict(unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds")
            return storage.at[rows, :, self.position].set(new[:, 0].astype(storage.dtype), **exact)

        keys, values = put(self.keys[layer], k), put(self.values[layer], v)
        queries = q.reshape(B, G, -1, D)
        seen = jnp.where(self.used, self.position + 1, 1)
        if window is not None and window + 1 < self.capacity:  # each row's last ones alone
            first = jnp.maximum(seen - window - 1, 0)
            part = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, window + 1, axis=1))
            y = formula(queries, part(keys, first), part(values, first), seen - first)
        elif self.implementation == "cudnn":
            y = by_cudnn(queries, keys, values, seen)
        else:
            y = formula(queries, keys, values, seen)
        return y.astype(q.dtype).reshape(q.shape), (keys, values)

    def append(self, ids: jax.Array, keys_values: list[tuple[jax.Array, jax.Array]]) -> "InPlaceCache":
        """The cache with this token of each row, (B, 1), and what `attend` returned for each layer."""
        keys, values = [k for k, _ in keys_values], [v for _, v in keys_values]
        return replace(self, keys=keys, values=values, last_ids=ids[:, 0].astype(jnp.int32))

    def advance(self, n: int) -> "InPlaceCache":
        return replace(self, position=self.position + n)


def by_cudnn(q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
    """`formula` by cuDNN, which reads the tokens that are seen and no others.

    Every head of keys is a row of the batch, and its query heads are its queries: the storage is given as it lies, and
    a token's keys are read once for all heads that use them.
    """
    B, G, R, D = q.shape

    def one_head(x):
        return x.reshape(B * G, -1, 1, D)

    y = jax.nn.dot_product_attention(
        one_head(q), one_head(keys), one_head(values), key_value_seq_lengths=jnp.repeat(seen, G), implementation="cudnn"
    )
    return y.reshape(B, G, R, D)


def formula(q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
    """Attention of one token per row: q (B, G, R, D) against keys and values (B, G, S, D), of which row b sees the
    first seen[b]. Returns the shape of q in float32.

    Sums, not matrix products, each apart from the softmax: on a GPU they are kernels that read a slice of the storage
    where it lies.
    """
    q, keys, values = (x.astype(jnp.float32) for x in (q, keys[:, :, None], values[:, :, None]))
    scores = (q[..., None, :] * keys).sum(-1) / math.sqrt(q.shape[-1])
    visible = jnp.arange(scores.shape[-1])[None] < seen[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    return (jax.lax.optimization_barrier(weights)[..., None] * values).sum(-2)
