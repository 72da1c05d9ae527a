"""nanochat in JAX: from raw text to a chat model, one readable file per concept.

The names below are the public ones. They are imported when first used: `import nanochat_jax` alone starts no JAX.

    model = nanochat_jax.load("my-run")                                 config, params, tokenizer, meta
    logits = nanochat_jax.forward(model.config, model.params, ids)      pure, as are init and next_token_loss
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanochat_jax.convert.params_reference import params_from_reference, params_to_reference
    from nanochat_jax.inference.engine import Engine
    from nanochat_jax.inference.request import SamplingParams
    from nanochat_jax.model.config import GPTConfig
    from nanochat_jax.model.gpt import forward
    from nanochat_jax.model.loss import next_token_loss
    from nanochat_jax.model.parameters import init
    from nanochat_jax.runs.load import load
    from nanochat_jax.text.tokenizer import Tokenizer
    from nanochat_jax.training.muon import muon

    __version__: str

__all__ = [
    "Engine",
    "GPTConfig",
    "SamplingParams",
    "Tokenizer",
    "__version__",
    "forward",
    "init",
    "load",
    "muon",
    "next_token_loss",
    "params_from_reference",
    "params_to_reference",
]

_HOMES = {
    "Engine": "inference.engine",
    "GPTConfig": "model.config",
    "SamplingParams": "inference.request",
    "Tokenizer": "text.tokenizer",
    "forward": "model.gpt",
    "init": "model.parameters",
    "load": "runs.load",
    "muon": "training.muon",
    "next_token_loss": "model.loss",
    "params_from_reference": "convert.params_reference",
    "params_to_reference": "convert.params_reference",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
