"""Parameters as a GPU decodes with them: one kernel for queries, keys and values.

XLA makes one product of the three by itself, and for that puts their kernels together anew for every token, which is
twice the memory traffic of the product. Of neighbouring slices of one array it puts nothing together: it takes the
array.
"""

from typing import Any

import jax.numpy as jnp

from nanochat_jax.model.config import GPTConfig

_PARTS = "c_q", "c_k", "c_v"


def join_qkv(params: Any) -> Any:
    """The tree with h/*/attn/c_qkv in place of c_q, c_k and c_v; other trees as they are."""
    return _in_attention(params, "c_q", _join)


def part_qkv(config: GPTConfig, params: Any) -> Any:
    """The tree that was joined. Called where the products are (inside a loop): outside, slices are copies."""
    return _in_attention(params, "c_qkv", lambda attn: _part(config, attn))


def _in_attention(params: Any, key: str, change) -> Any:
    """The tree with `change` applied to every layer's attn that has the key."""
    layers = params.get("h", {})
    if not any(key in layer.get("attn", {}) for layer in layers.values()):
        return params
    return {**params, "h": {i: {**layer, "attn": change(layer["attn"])} for i, layer in layers.items()}}


def _join(attn: dict[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in attn.items() if name not in _PARTS}
    kernels = [attn[name]["kernel"] for name in _PARTS]
    return {**others, "c_qkv": {"kernel": jnp.concatenate(kernels, axis=1)}}


def _part(config: GPTConfig, attn: dict[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in attn.items() if name != "c_qkv"}
    queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    kernels = jnp.split(attn["c_qkv"]["kernel"], (queries, queries + keys), axis=1)
    return {**others, **{name: {"kernel": kernel} for name, kernel in zip(_PARTS, kernels, strict=True)}}
