"""One small pretraining run for all tests that start a stage: what it compiles, they find in the cache of the suite."""

import functools
import os
import sys
from pathlib import Path

import jax.numpy as jnp

from nanochat_jax.demo_world import demo_documents
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.runs import checkpoint
from nanochat_jax.stages import base, rl, supervised
from nanochat_jax.stages.main import main
from nanochat_jax.text.tokenizer import Tokenizer
from tests import children
from tests.toy_params import toy_params

ROOT = Path(__file__).parents[1]

# 192 tokens hold a conversation of the demo world; two rows a device and step, one after the other. Everything that the
# training step is compiled from is given, so that --demo changes nothing.
FLAGS = dict(depth=1, max_seq_len=192, device_batch_size=1, total_batch_size=3072, num_iterations=4, eval_tokens=1536)
FLAGS |= dict(warmdown_ratio=0.5)


@functools.cache
def toy_tokenizer() -> Tokenizer:
    return Tokenizer.train(demo_documents("train", 200_000), 500)


@functools.cache
def small_tokenizer() -> Tokenizer:
    """270 tokens, as many as the golden models of other formats have."""
    return Tokenizer.train(["the cat sat on the mat and the bat"] * 4, 270)


def saved_run(name: str, tokenizer: Tokenizer, config: GPTConfig, stage="base", steps=(1,), **meta) -> Path:
    """A run as training leaves it, without records: for every step a checkpoint of parameters drawn with that seed."""
    folder = checkpoint.run_dir(name)
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    common = {"stage": stage, "config": checkpoint.config_to_dict(config), "tokenizer_hash": tokenizer.hash}
    for step in steps:
        state = {"params": toy_params(config, step), "step": jnp.int32(step)}
        checkpoint.save(folder, step, state, {**common, "evaluated": True, **meta})
    return folder


def use(folder: Path, patch, samples: bool = True) -> None:
    """Makes `folder` the base directory, with a tokenizer. samples: whether stages show what their model says."""
    patch.setenv("NANOCHAT_BASE_DIR", str(folder))
    toy_tokenizer().save(folder / "tokenizer")
    for module in () if samples else (base, supervised, rl):
        patch.setattr(module, "greedy_sampler", lambda *args: lambda params: [])


def start(stage: str, *switches: str, **flags) -> int:
    """Runs a stage as a user does; the exit code."""
    return main([f"--stage={stage}", "--device=cpu", *switches, *(f"--{k}={v}" for k, v in flags.items())])


def launch(stage: str, home: Path, log: str = "log.txt", env: dict[str, str] | None = None, **flags):
    """Starts a stage as a process of its own, which has one device; processes of homes side by side share programs."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(home.parent / "cache"), **(env or {})}
    command = [sys.executable, "-m", "scripts.train", f"--stage={stage}", "--demo", "--device=cpu"]
    with open(home / log, "a") as file:
        return children.start(
            [*command, *(f"--{k}={v}" for k, v in flags.items())],
            cwd=ROOT,
            env=env | {"NANOCHAT_BASE_DIR": str(home)},
            stdout=file,
            stderr=file,
        )
