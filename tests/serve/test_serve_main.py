"""python -m scripts.serve: flags, a run that is followed while it is trained, and how it stops."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import jax
import numpy as np
import pytest

from nanochat_jax.model import gpt
from nanochat_jax.runs import checkpoint
from nanochat_jax.serve import main as serving
from nanochat_jax.serve.watch import Watcher
from tests import children
from tests.serve_fixtures import CHAT
from tests.tokenizer_fixtures import golden_tokenizer
from tests.toy_params import toy_params

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(base):
    """An empty run's directory."""
    folder = checkpoint.run_dir("tiny-sft")
    folder.mkdir(parents=True)
    golden_tokenizer().save(folder)
    return folder


def save(run: Path, step: int, sign: float = 1.0, **changes) -> dict:
    config = gpt.GPTConfig(
        sequence_len=64, vocab_size=golden_tokenizer().vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=16
    )
    params = toy_params(config)
    params = {**params, "lm_head": jax.tree.map(lambda x: sign * x, params["lm_head"])}
    meta = {"config": checkpoint.config_to_dict(config), "stage": "sft", "tokenizer_hash": golden_tokenizer().hash}
    checkpoint.save(run, step, {"params": params}, {**meta, **changes})
    return checkpoint.load_meta(run, step)


# --- flags and what can go wrong at the start -----------------------------------------------------


@pytest.mark.parametrize(
    "flag",
    [
        "--port=70000", "--slots=0", "--queue=-1", "--temperature=3", "--max_tokens=0", "--watch --step=3",
        "--model_tag=b --run=a", "--api_key=a\u00a0b", "--api_key=",
    ],
)  # fmt: skip
def test_bad_flags(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        serving.main(flag.split(" "))
    assert stop.value.code == 2 and flag.split("=")[0].split(" ")[0] in capsys.readouterr().err


def test_a_key_from_the_environment(monkeypatch, capsys):
    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)
    assert serving._given_key(serving.ServeSettings()) is None
    monkeypatch.setenv("NANOCHAT_API_KEY", "")
    assert serving._given_key(serving.ServeSettings()) is None
    monkeypatch.setenv("NANOCHAT_API_KEY", "theirs")
    assert serving._given_key(serving.ServeSettings()) == "theirs"
    assert serving._given_key(serving.ServeSettings(api_key="mine")) == "mine", "a flag is nearer"
    monkeypatch.setenv("NANOCHAT_API_KEY", "two words")
    with pytest.raises(SystemExit) as stop:
        serving.main(["--port=0"])
    assert stop.value.code == 2 and "NANOCHAT_API_KEY" in capsys.readouterr().err


def test_an_address_that_cannot_be_listened_on(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serving.main([f"--port={port}"]) == 1
        assert f"port {port}" in capsys.readouterr().err
    for host in ("no.such.host.invalid", "no..name"):
        assert serving.main([f"--host={host}"]) == 1
        assert "--host" in capsys.readouterr().err


# --- following a run ------------------------------------------------------------------------------


def test_the_newest_usable_checkpoint_takes_over(run, caplog):
    worker = SimpleNamespace(model=CHAT, swapping=False, given=[])
    worker.replace = lambda params, model: worker.given.append((params, model))
    watcher = Watcher(worker, run, save(run, 7))  # type: ignore[arg-type]
    watcher._look()
    assert worker.given == [], "nothing new"
    save(run, 8, sign=-1.0)
    worker.swapping = True
    watcher._look()
    assert worker.given == [], "one at a time"
    worker.swapping = False
    watcher._look()
    watcher._look()
    ((params, model),) = worker.given
    assert model == dataclasses.replace(CHAT, step=8, created=model.created) and abs(model.created - time.time()) < 60
    expected = checkpoint.load_params(run, checkpoint.load_meta(run, 8))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True))


def test_a_checkpoint_that_cannot_be_used_is_passed_over(run, caplog):
    worker = SimpleNamespace(model=CHAT, swapping=False, given=[])
    worker.replace = lambda params, model: worker.given.append(model.step)
    watcher = Watcher(worker, run, save(run, 7), poll=0.01)  # type: ignore[arg-type]
    watcher.start()
    save(run, 8, tokenizer_hash="another")
    _until(lambda: "step 8" in caplog.text)
    assert worker.given == []
    save(run, 9)
    _until(lambda: worker.given == [9])
    watcher.stop()
    assert caplog.text.count("step 8") == 1, "told once"


def _until(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# --- the process ----------------------------------------------------------------------------------


@contextlib.contextmanager
def started(*flags: str) -> Iterator[tuple[subprocess.Popen, str, list[str]]]:
    """(process, address, lines printed until it was ready; after the end, all lines)."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "scripts.serve", "--port=0", "--slots=2", "--warm_up=False", *flags]
    process = children.start(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: list[str] = []
    assert process.stdout is not None
    found = None
    while found is None:
        line = process.stdout.readline()
        assert line, "".join(lines)
        lines.append(line)
        found = re.search(r"http://\S+?:(\d+) ", line)
    yield process, f"http://127.0.0.1:{found[1]}", lines
    assert process.wait(15) == 0
    lines += process.stdout
    assert "Traceback" not in "".join(lines)


@pytest.mark.slow
def test_it_follows_a_run_and_stops_when_asked(run):
    save(run, 7)
    with started("--watch") as (process, url, lines):
        assert re.search("tiny-sft.* step 7", "".join(lines))
        body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 10}
        first = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        save(run, 9, sign=-1.0)
        _until(lambda: httpx.get(f"{url}/v1/models").json()["data"][0]["step"] == 9)
        second = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert (first["system_fingerprint"], second["system_fingerprint"]) == ("tiny-sft-step-7", "tiny-sft-step-9")
        assert first["choices"] != second["choices"]
        process.send_signal(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, "a-key-of-my-own"])
def test_a_key_is_made_for_an_open_address_and_one_of_ones_own_is_not_shown(run, monkeypatch, given):
    save(run, 7)
    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)
    if given:
        monkeypatch.setenv("NANOCHAT_API_KEY", given)
    with started(*([] if given else ["--host=0.0.0.0"])) as (process, url, lines):
        key = given or re.findall(r": (\S{20,})\n", "".join(lines))[-1]
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        process.send_signal(signal.SIGINT)  # Ctrl-C
    assert "".join(lines).count(key) == (0 if given else 1)
