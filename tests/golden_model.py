"""The golden files' small model, whose vocabulary is the golden tokenizer's, and the engine of the tests that need no
special one: with the same model and the same sizes its programs are compiled once."""

import functools
from typing import Any

import numpy as np

from nanochat_jax import gpt
from nanochat_jax.engine import Engine
from nanochat_jax.reference import params_from_reference
from tests.tokenizer_fixtures import GOLDEN, golden_tokenizer


@functools.cache
def golden_model() -> tuple[gpt.GPTConfig, gpt.Params]:
    """GQA, 2 layers, 520 tokens, at most 640 positions."""
    with np.load(GOLDEN / "tokmodel_v1.npz") as arrays:
        sizes: dict[str, Any] = {k.split("/")[1]: int(arrays[k]) for k in arrays if k.startswith("config/")}
        config = gpt.GPTConfig(**sizes)
        named = {k.removeprefix("param/"): arrays[k] for k in arrays if k.startswith("param/")}
        return config, params_from_reference(config, named)


def golden_engine(**changes) -> Engine:
    settings: dict[str, Any] = dict(slots=4, capacity=256, steps_per_call=8)
    return Engine(*golden_model(), golden_tokenizer(), **{**settings, **changes})
