"""kill -9 in midtraining, finetuning and reinforcement learning: resumed runs are bit-equal to uninterrupted ones."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from nanochat_jax import checkpoint, metrics
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.world import demo_documents

ROOT = Path(__file__).parent.parent
TIMING = ("seconds", "tok_per_sec", "data_wait", "mfu")
KILLS = 5
COMMON = dict(device="cpu", device_batch_size=4, eval_tokens=2048, save_every=1, run_name="r")
STAGES = {
    "base": dict(depth=1, max_seq_len=192, total_batch_size=1536, num_iterations=3),
    "mid": dict(total_batch_size=1536, num_iterations=40, eval_every=10),
    "sft": dict(total_batch_size=1536, num_iterations=40, eval_every=10, metrics_max_problems=16),
    "rl": dict(num_iterations=20, examples_per_step=2, num_samples=4, max_new_tokens=16, slots=8, eval_examples=4)
    | dict(eval_samples=2, eval_every=10),
}
SOURCE = {"mid": "base", "sft": "base", "rl": "sft"}


def start(home: Path, stage: str, **changes) -> subprocess.Popen:
    flags = {**COMMON, **STAGES[stage], **changes}
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(home), "JAX_COMPILATION_CACHE_DIR": str(home.parent / "cache")}
    command = [sys.executable, "-m", "scripts.train", f"--stage={stage}", "--demo"]
    command += [f"--{k}={v}" for k, v in flags.items()]
    with open(home / "log.txt", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def finish(home: Path, stage: str, **changes) -> None:
    assert start(home, stage, **changes).wait(300) == 0, (home / "log.txt").read_text()[-2000:]


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A base directory with a base and a finetuned toy model."""
    home = tmp_path_factory.mktemp("parents") / "home"
    home.mkdir()
    Tokenizer.train(demo_documents("train", 200_000), 500).save(home / "tokenizer")
    finish(home, "base", run_name="base")
    finish(home, "sft", run_name="sft", source="base", num_iterations=4)
    return home


def result(home: Path, steps: int) -> tuple[str, list[dict]]:
    """Hash of everything in the last checkpoint, and all records without the clock."""
    run = home / "runs" / "r"
    tree = checkpoint.ocp.load(checkpoint.step_dir(run, steps) / "state")
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(tree), key=lambda item: str(item[0])):
        digest.update(str(path).encode() + np.asarray(leaf).tobytes())
    records = [r for r in metrics.read(run / "metrics.jsonl") if r["kind"] != "session"]
    return digest.hexdigest(), [{k: v for k, v in r.items() if k not in TIMING} for r in records]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["mid", "sft", "rl"])
def test_killed_equals_uninterrupted(stage, parents, tmp_path):
    steps, source = STAGES[stage]["num_iterations"], SOURCE[stage]
    whole, cut = parents.parent / f"whole-{stage}", parents.parent / f"cut-{stage}"
    for home in (whole, cut):
        shutil.copytree(parents, home)
    finish(whole, stage, source=source)
    run, rng = cut / "runs" / "r", random.Random(7)
    for kill in range(KILLS):
        process = start(cut, stage, source=source)
        before = (checkpoint.steps(run) or [0])[-1]
        deadline = time.monotonic() + 300
        while process.poll() is None and (checkpoint.steps(run) or [0])[-1] < before + 2:
            assert time.monotonic() < deadline, (cut / "log.txt").read_text()[-2000:]
            time.sleep(0.001)
        while kill % 2 and process.poll() is None and not any((run / "checkpoints").glob(".*.writing")):
            time.sleep(0.0005)  # into a save
        time.sleep(0.0 if kill % 2 else rng.random() * 0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (cut / "log.txt").read_text()[-2000:]
    finish(cut, stage, source=source)
    assert result(cut, steps) == result(whole, steps)
