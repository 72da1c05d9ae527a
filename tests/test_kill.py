"""kill -9 at random moments, half of them inside a save: the resumed run must be bit-equal to an uninterrupted one."""

import hashlib
import os
import random
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

ROOT = Path(__file__).parent.parent
STEPS, KILLS = 90, 20
TIMING = ("seconds", "tok_per_sec", "data_wait", "mfu")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(5)
    words = "the a cat dog sun moon walks sings sees under over river tree red blue and then she he".split()
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    stories = (" ".join(rng.choice(words) for _ in range(rng.randint(20, 120))) + "." for _ in range(600))
    path.write_text("\n\n".join(stories))
    return path


def start(base: Path, text: Path) -> subprocess.Popen:
    flags = dict(depth=1, max_seq_len=32, device_batch_size=4, total_batch_size=256, num_iterations=STEPS)
    flags |= dict(eval_every=30, eval_tokens=512, save_every=1, data=text, run_name="r", device="cpu")
    # one compile cache for all, so that every start is quick
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "JAX_COMPILATION_CACHE_DIR": str(text.parent / "cache")}
    command = [sys.executable, "-m", "scripts.train", "--stage=base", *(f"--{k}={v}" for k, v in flags.items())]
    with open(base / "log.txt", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def new_base(tmp_path: Path, name: str, text: Path, monkeypatch) -> Path:
    base = tmp_path / name
    base.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    Tokenizer.train(text.read_text().split("\n\n"), 300).save(base / "tokenizer")
    return base


def result(base: Path) -> tuple[str, list[dict]]:
    """Hash of everything in the last checkpoint, and all records without the clock."""
    run = base / "runs" / "r"
    tree = checkpoint.ocp.load(checkpoint.step_dir(run, STEPS) / "state")
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(tree), key=lambda item: str(item[0])):
        digest.update(str(path).encode() + np.asarray(leaf).tobytes())
    records = [r for r in metrics.read(run / "metrics.jsonl") if r["kind"] != "session"]
    return digest.hexdigest(), [{k: v for k, v in r.items() if k not in TIMING} for r in records]


def wait_for(condition, process: subprocess.Popen, base: Path, limit: float = 300) -> None:
    deadline = time.monotonic() + limit
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, (base / "log.txt").read_text()[-2000:]
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_twenty_times_equals_uninterrupted(tmp_path, text, monkeypatch):
    whole = new_base(tmp_path, "whole", text, monkeypatch)
    assert start(whole, text).wait(300) == 0, (whole / "log.txt").read_text()[-2000:]
    cut = new_base(tmp_path, "cut", text, monkeypatch)
    run, rng = cut / "runs" / "r", random.Random(11)
    kills = inside_a_save = 0
    while kills < KILLS:
        process = start(cut, text)
        before = (checkpoint.steps(run) or [0])[-1]
        wait_for(lambda before=before: (checkpoint.steps(run) or [0])[-1] > before, process, cut)
        if kills % 2:
            wait_for(lambda: any((run / "checkpoints").glob(".*.writing")), process, cut)
        else:
            time.sleep(rng.random() * 0.1)
        process.kill()
        code = process.wait()
        assert code in (0, -signal.SIGKILL), (cut / "log.txt").read_text()[-2000:]
        assert code != 0, f"the run ended after only {kills} kills: give it more steps"
        kills += 1
        inside_a_save += any((run / "checkpoints").glob(".*.writing"))
    assert start(cut, text).wait(300) == 0, (cut / "log.txt").read_text()[-2000:]
    assert inside_a_save >= 5, "too few kills hit a save for this test to mean anything"
    assert result(cut) == result(whole)


@pytest.mark.slow
def test_sigterm_exits_cleanly_and_the_rest_is_identical(tmp_path, text, monkeypatch):
    whole = new_base(tmp_path, "whole", text, monkeypatch)
    assert start(whole, text).wait(300) == 0
    cut = new_base(tmp_path, "cut", text, monkeypatch)
    process = start(cut, text)
    wait_for(lambda: len(checkpoint.steps(cut / "runs" / "r")) > 1, process, cut)
    process.terminate()
    assert process.wait(60) == 0
    assert "saved. The same command goes on" in (cut / "log.txt").read_text()
    assert start(cut, text).wait(300) == 0
    assert "going on with" in (cut / "log.txt").read_text()
    assert result(cut) == result(whole)
