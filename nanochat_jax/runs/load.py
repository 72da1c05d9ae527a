"""A trained model in one call, for use from Python: `nanochat_jax.load("my-run")`."""

from typing import Any, NamedTuple

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.parameters import Params
from nanochat_jax.runs import checkpoint
from nanochat_jax.text.tokenizer import Tokenizer


class TrainedModel(NamedTuple):
    """What a run has trained: parameters on the default device, and its meta.json (stage, step, run, settings, ...)."""

    config: GPTConfig
    params: Params
    tokenizer: Tokenizer
    meta: dict[str, Any]


def load(run: str | None = None, stage: str | None = None, step: int | None = None) -> TrainedModel:
    """The model of a run below the base directory (NANOCHAT_BASE_DIR): by default the newest run (of `stage`, such as
    "sft"), and of it the newest step. Raises CheckpointError where there is none or its files are damaged."""
    return TrainedModel(*checkpoint.load_model(run, stage, step))
