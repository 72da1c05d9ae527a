"""The d20 preset run for real on a CPU, as far as pretraining, with tiny flags and shards from a slow local hub."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanochat_jax.data.hub import DEFAULT_REPO
from nanochat_jax.demo_world import demo_documents
from nanochat_jax.runs import checkpoint, metrics
from tests import children, speedrun_environment
from tests.web_server import HubServer

ROOT = Path(__file__).resolve().parent.parent
TRAIN_SHARDS, FIRST, STEPS = 14, 8, 60
# more text than the first shards have
FLAGS = dict(depth=1, max_seq_len=64, device_batch_size=16, total_batch_size=8192, num_iterations=STEPS, device="cpu")
FLAGS |= dict(eval_tokens=1024, eval_every=0, sample_every=0, save_every=5)
# The tests' own Python, which makes a smaller tokenizer of less text than the script says
PYTHON = f"""#!/bin/sh
for argument; do
  shift
  case $argument in
    --max_chars=*) argument=--max_chars=700000 ;;
    --vocab_size=*) argument=--vocab_size=1000 ;;
  esac
  set -- "$@" "$argument"
done
exec {shlex.quote(sys.executable)} "$@"
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, bytes]:
    """Made of lines of the demo world's text as a user makes them; no shard has less than 1,024 documents."""
    folder = tmp_path_factory.mktemp("shards")
    lines = (line for text in demo_documents("train", 10**7) for line in text.splitlines() if line)
    texts = [json.dumps({"text": line}) for line in itertools.islice(lines, (TRAIN_SHARDS + 1) * 1024)]
    (folder / "text.jsonl").write_text("\n".join(texts))
    command = [sys.executable, "-m", "dev.repackage_data", f"--data={folder / 'text.jsonl'}", f"--out={folder / 'out'}"]
    children.run([*command, "--shard_chars=1000"], cwd=ROOT, check=True, timeout=120)
    found = {path.name: path.read_bytes() for path in sorted((folder / "out").glob("*.parquet"))}
    assert TRAIN_SHARDS <= len(found) - 1 <= TRAIN_SHARDS + 1
    return found


class Hub(HubServer):
    """A hub whose shards after the first ones come once `release` is set."""

    def __init__(self, shards: dict[str, bytes]):
        super().__init__()
        self.publish(DEFAULT_REPO, shards)
        self.release, self.later = threading.Event(), set(sorted(shards)[FIRST:-1])

    def _get(self, handler):
        if handler.path.rpartition("/")[2] in self.later:
            self.release.wait()
        super()._get(handler)

    def asked(self) -> int:
        """How often one of the later shards was asked for."""
        return sum(path.rpartition("/")[2] in self.later for path, _ in self.heads)


@pytest.fixture
def hub(shards):
    server = Hub(shards)
    yield server
    server.release.set()
    server.close()


@pytest.fixture
def speedrun(tmp_path, hub):
    """Starts the script; its environment is the tests' own, and said to be complete."""
    venv = speedrun_environment.make(tmp_path / "venv", PYTHON)
    env = {k: v for k, v in os.environ.items() if k not in ("WANDB_RUN", "MAX_PROBLEMS", "PRICE_PER_HOUR", "XLA_FLAGS")}
    env |= {"PRESET": "d20", "VENV": str(venv), "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    env |= {"HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    def start(log: Path) -> subprocess.Popen:
        flags = [f"--base.{k}={v}" for k, v in FLAGS.items()]
        with open(log, "w") as file:
            return children.start(["bash", "speedrun_jax.sh", *flags], cwd=ROOT, env=env, stdout=file, stderr=file)

    return start


def wait_for(condition, process: subprocess.Popen, log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
def test_pretraining_downloads_what_it_lacks_and_further_runs_resume(speedrun, hub, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    run, folder = tmp_path / "base" / "runs" / "d20-base", tmp_path / "base" / "data" / "fineweb_edu"
    tokenizer = tmp_path / "base" / "tokenizer" / "tokenizer.json"
    logs = [tmp_path / f"{i}.log" for i in range(2)]

    process = speedrun(logs[0])
    wait_for(hub.asked, process, logs[0])  # training needs more than there is
    assert {p.name for p in folder.glob("*.parquet")} == {*sorted(shards)[:FIRST], max(shards)}
    hub.release.set()
    wait_for(lambda: checkpoint.steps(run), process, logs[0])
    process.send_signal(signal.SIGTERM)  # to the script alone
    assert process.wait(60) == 143
    step, made = checkpoint.steps(run)[-1], tokenizer.stat().st_mtime_ns
    assert f"step {step}" in logs[0].read_text() and "=== evaluate" not in logs[0].read_text()

    process = speedrun(logs[1])
    wait_for(lambda: "=== evaluate: base" in logs[1].read_text(), process, logs[1])
    process.terminate()
    assert process.wait(60) == 143 and tokenizer.stat().st_mtime_ns == made
    trained = [r["step"] for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "train"]
    assert trained == list(range(STEPS)) and checkpoint.steps(run)[-1] == STEPS  # none twice: it resumed
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == shards
