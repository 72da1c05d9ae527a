"""Processes killed at random moments, -9 and TERM, in every stage: resumed runs are bit-equal to uninterrupted ones.

NANOCHAT_KILLS is the number of kills over all stages (default 16).
"""

import hashlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from nanochat_jax.runs import checkpoint, metrics
from tests.toy_runs import launch, toy_tokenizer

TIMING = ("seconds", "tok_per_sec", "data_wait", "mfu")
KILLS = max(1, int(os.environ.get("NANOCHAT_KILLS", "16")) // 4)  # a stage
# A process that is killed has saved at least one step more, but for "early", and mostly not many more.
STEPS = 12 + 5 * KILLS
COMMON = dict(device_batch_size=4, eval_tokens=1024, save_every=1, sample_every=0, run_name="r")
SIZE = dict(max_seq_len=192, total_batch_size=1536, eval_every=10)
STAGES = {  # all parts of the modern recipe but in midtraining, which it has not
    "base": dict(recipe="modern", depth=2) | SIZE,
    "mid": dict(total_batch_size=1536, eval_every=10),
    "sft": dict(total_batch_size=1536, eval_every=10, metrics_max_problems=4),
    "rl": dict(examples_per_step=2, num_samples=4, max_new_tokens=16, slots=8, eval_examples=4, eval_samples=2)
    | dict(eval_every=10),
}
SOURCE = {"base": None, "mid": "v1", "sft": "base", "rl": "sft"}
# When: at any time after a step was saved; while a checkpoint is being written; at any time from the first instruction
# to a little after the usual time of the first save
MOMENTS = ("between", "saving", "early")


def start(home: Path, stage: str, **changes) -> subprocess.Popen:
    flags = {**COMMON, **STAGES[stage], "num_iterations": STEPS, **changes}
    if SOURCE[stage]:
        flags.setdefault("source", SOURCE[stage])
    return launch(stage, home, **flags)


def finish(home: Path, stage: str, **changes) -> None:
    assert start(home, stage, **changes).wait(1200) == 0, (home / "log.txt").read_text()[-2000:]


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A base directory with two base models and a finetuned one."""
    home = tmp_path_factory.mktemp("parents") / "home"
    home.mkdir()
    toy_tokenizer().save(home / "tokenizer")
    finish(home, "base", run_name="v1", num_iterations=3, recipe="v1", depth=1)
    finish(home, "base", run_name="base", num_iterations=3)
    finish(home, "sft", run_name="sft", num_iterations=4)
    return home


def result(home: Path) -> tuple[str, list[dict]]:
    """Hash of everything in the last checkpoint, and all records without the clock."""
    run = home / "runs" / "r"
    tree = checkpoint.ocp.load(str(checkpoint.step_dir(run, STEPS) / "state"))
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(tree), key=lambda item: str(item[0])):
        digest.update(str(path).encode() + np.asarray(leaf).tobytes())
    records = [r for r in metrics.read(run / "metrics.jsonl") if r["kind"] != "session"]
    return digest.hexdigest(), [{k: v for k, v in r.items() if k not in TIMING} for r in records]


def newest(run: Path) -> int:
    return (checkpoint.steps(run) or [0])[-1]


def saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".*.writing"))


def wait_until(condition, process: subprocess.Popen, home: Path) -> None:
    deadline = time.monotonic() + 300
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, (home / "log.txt").read_text()[-2000:]
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES))
def test_killed_at_any_moment_equals_uninterrupted(stage, parents):
    whole, cut = parents.parent / f"whole-{stage}", parents.parent / f"cut-{stage}"
    for home in (whole, cut):
        shutil.copytree(parents, home)
    finish(whole, stage, save_every=0)  # when it saves changes nothing
    run, rng = cut / "runs" / "r", random.Random(7)
    inside_a_save = terminated = before_a_step = 0
    ready = [5.0]  # seconds from a process's start to its first save
    for kill in range(KILLS):
        number = signal.SIGTERM if kill % 4 == 3 else signal.SIGKILL
        moment = MOMENTS[kill % 3]
        began, process, before = time.monotonic(), start(cut, stage), newest(run)
        if moment == "early":
            time.sleep(rng.random() * 1.2 * statistics.median(ready))
        else:
            wait_until(lambda before=before: newest(run) > before, process, cut)
            ready.append(time.monotonic() - began)
            if moment == "saving":
                wait_until(lambda: saving(run), process, cut)
            else:
                time.sleep(rng.random() * 0.2)
        process.send_signal(number)
        code = process.wait(120)
        # TERM before training has begun ends the process as usual: there is nothing to save yet
        assert code in ((0, -number) if number == signal.SIGTERM else (-number,)), (cut / "log.txt").read_text()[-2000:]
        inside_a_save += saving(run)
        terminated += number == signal.SIGTERM and code == 0
        before_a_step += newest(run) == before
        assert newest(run) < STEPS, f"the run ended after {kill + 1} kills: give it more steps"
        if number == signal.SIGTERM and code == 0:
            checkpoint.verify(run, newest(run), checkpoint.load_meta(run))
            assert f"stopped by SIGTERM at step {newest(run)}" in (cut / "log.txt").read_text()
    finish(cut, stage)
    assert result(cut) == result(whole)
    assert not saving(run)
    if KILLS >= 4:
        assert inside_a_save, "no kill hit a save: this test means nothing"
        assert terminated, "no process was ended by TERM while it trained"
    print(
        f"{stage}: {KILLS} kills, {inside_a_save} of them during a save, {before_a_step} before anything was saved, "
        f"{terminated} clean ends after TERM; first save after {statistics.median(ready):.1f} s; bit-equal"
    )
