"""Arrays and models of the golden files, each read once."""

import functools
from typing import Any

import numpy as np

from nanochat_jax.convert.params_reference import params_from_reference
from nanochat_jax.model.gpt import GPTConfig
from tests.tokenizer_fixtures import GOLDEN

SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")


@functools.cache
def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """Contents of a golden .npz file."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def below(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Those whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


@functools.cache
def golden_model(name: str = "tokmodel_v1", prefix: str = "") -> tuple[GPTConfig, Any]:
    """(config, parameters) of a golden model; `tokmodel_v1` has the golden tokenizer's vocabulary."""
    arrays = below(golden_arrays(name), prefix)
    sizes: dict[str, Any] = {size: int(arrays[f"config/{size}"]) for size in SIZES}
    config = GPTConfig(**sizes)
    return config, params_from_reference(config, below(arrays, "param/"))
