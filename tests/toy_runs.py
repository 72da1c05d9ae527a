"""One small pretraining run for all tests that start a stage: what it compiles, they find in the cache of the suite."""

import functools
from pathlib import Path

from nanochat_jax.demo_world import demo_documents
from nanochat_jax.stages.main import main
from nanochat_jax.text.tokenizer import Tokenizer

# 192 tokens hold a conversation of the demo world; two rows a device and step, one after the other. Everything that the
# training step is compiled from is given, so that --demo changes nothing.
FLAGS = dict(depth=1, max_seq_len=192, device_batch_size=1, total_batch_size=3072, num_iterations=4, eval_tokens=1536)
FLAGS |= dict(warmdown_ratio=0.5)


@functools.cache
def toy_tokenizer() -> Tokenizer:
    return Tokenizer.train(demo_documents("train", 200_000), 500)


def use(folder: Path, patch) -> None:
    """Makes `folder` the base directory, with a tokenizer."""
    patch.setenv("NANOCHAT_BASE_DIR", str(folder))
    toy_tokenizer().save(folder / "tokenizer")


def start(stage: str, *switches: str, **flags) -> int:
    """Runs a stage as a user does; the exit code."""
    return main([f"--stage={stage}", "--device=cpu", *switches, *(f"--{k}={v}" for k, v in flags.items())])
