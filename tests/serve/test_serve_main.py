"""python -m scripts.serve: flags, a run that is followed while it is trained, and how it stops."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jax
import numpy as np
import pytest

from nanochat_jax.convert.params_reference import params_from_reference
from nanochat_jax.model import gpt
from nanochat_jax.runs import checkpoint
from nanochat_jax.serve import main as serving
from nanochat_jax.serve.watch import Watcher
from tests import children
from tests.serve_fixtures import CHAT
from tests.tokenizer_fixtures import GOLDEN, golden_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny():
    """(config, params) of the golden files' model."""
    with np.load(GOLDEN / "tokmodel_v1.npz") as arrays:
        sizes: dict[str, Any] = {k.split("/")[1]: int(arrays[k]) for k in arrays if k.startswith("config/")}
        config = gpt.GPTConfig(**sizes)
        names = [k for k in arrays if k.startswith("param/")]
        return config, params_from_reference(config, {k.removeprefix("param/"): arrays[k] for k in names})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """An empty run's directory."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = checkpoint.run_dir("tiny-sft")
    folder.mkdir(parents=True)
    golden_tokenizer().save(folder)
    return folder


def save(run: Path, tiny, step: int, sign: float = 1.0, **changes) -> dict:
    config, params = tiny
    params = {**params, "lm_head": jax.tree.map(lambda x: sign * x, params["lm_head"])}
    meta = {"config": checkpoint.config_to_dict(config), "stage": "sft", "tokenizer_hash": golden_tokenizer().hash}
    checkpoint.save(run, step, {"params": params}, {**meta, **changes})
    return checkpoint.load_meta(run, step)


# --- flags and what can go wrong at the start -----------------------------------------------------


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--port=70000"], "--port"),
        (["--slots=0"], "--slots"),
        (["--queue=-1"], "--queue"),
        (["--temperature=3"], "--temperature"),
        (["--max_tokens=0"], "--max_tokens"),
        (["--watch", "--step=3"], "--watch"),
        (["--run=a", "--model_tag=b"], "two names"),
        (["--api_key=a b"], "--api_key"),
        (["--api_key="], "--api_key"),
    ],
)
def test_bad_flags(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        serving.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


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
    assert stop.value.code == 2 and capsys.readouterr().err == "error: NANOCHAT_API_KEY must be ASCII without spaces\n"
    with pytest.raises(SystemExit):
        serving.main(["--help"])
    assert "NANOCHAT_API_KEY" in capsys.readouterr().out


def test_no_model_says_how_to_train_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert serving.main(["--port=0", "--device=cpu"]) == 1
    assert "speedrun_jax.sh" in capsys.readouterr().err


def test_an_address_that_cannot_be_listened_on(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serving.main([f"--port={port}"]) == 1
        assert f"port {port}" in capsys.readouterr().err
    for host in ("no.such.host.invalid", "no..name"):
        assert serving.main([f"--host={host}"]) == 1
        assert "--host" in capsys.readouterr().err


# --- following a run ------------------------------------------------------------------------------


def test_the_newest_usable_checkpoint_takes_over(run, tiny, caplog):
    worker = SimpleNamespace(model=CHAT, swapping=False, given=[])
    worker.replace = lambda params, model: worker.given.append((params, model))
    watcher = Watcher(worker, run, save(run, tiny, 7))  # type: ignore[arg-type]
    watcher._look()
    assert worker.given == [], "nothing new"
    save(run, tiny, 8, sign=-1.0)
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


def test_a_checkpoint_that_cannot_be_used_is_passed_over(run, tiny, caplog):
    worker = SimpleNamespace(model=CHAT, swapping=False, given=[])
    worker.replace = lambda params, model: worker.given.append(model.step)
    watcher = Watcher(worker, run, save(run, tiny, 7), poll=0.01)  # type: ignore[arg-type]
    watcher.start()
    save(run, tiny, 8, tokenizer_hash="another")
    _until(lambda: "another tokenizer_hash" in caplog.text)
    assert worker.given == []
    save(run, tiny, 9)
    _until(lambda: worker.given == [9])
    watcher.stop()
    assert caplog.text.count("cannot use the checkpoint of step 8") == 1, "told once"


def _until(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# --- the process ----------------------------------------------------------------------------------


def start(*flags: str) -> tuple[subprocess.Popen, str, list[str]]:
    """(process, address, lines printed until it was ready)."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "scripts.serve", "--port=0", "--slots=2", "--warm_up=False", *flags]
    process = children.start(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"Server ready at http://\S+?:(\d+) ", line):
            return process, f"http://127.0.0.1:{found[1]}", lines
    raise AssertionError("".join(lines))


@pytest.mark.slow
def test_it_follows_a_run_and_stops_when_asked(run, tiny):
    save(run, tiny, 7)
    process, url, lines = start("--watch")
    try:
        assert "tiny-sft, stage sft, step 7, saved " in "".join(lines)
        body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 10}
        first = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        save(run, tiny, 9, sign=-1.0)
        _until(lambda: httpx.get(f"{url}/v1/models").json()["data"][0]["step"] == 9)
        second = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert (first["system_fingerprint"], second["system_fingerprint"]) == ("tiny-sft-step-7", "tiny-sft-step-9")
        assert first["choices"] != second["choices"]

        got: list[str] = []

        def read():
            long = {"prompt": [5], "stream": True, "n": 16, "max_tokens": 60}
            with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as answer:
                got.extend(answer.iter_text())

        reader = threading.Thread(target=read)
        reader.start()
        _until(lambda: got)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0 and time.monotonic() - begin < 10
        reader.join(5)
        assert not reader.is_alive() and got[-1].endswith("data: [DONE]\n\n")
        assert process.stdout is not None and "Traceback" not in process.stdout.read()
    finally:
        process.kill()


@pytest.mark.slow
def test_an_open_address_gets_a_key(run, tiny):
    save(run, tiny, 7)
    process, url, lines = start("--host=0.0.0.0")
    try:
        (key,) = re.findall(r"API key .*: (\S{20,})\n", "".join(lines))
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        process.send_signal(signal.SIGINT)  # Ctrl-C
        assert process.wait(15) == 0
        assert json.dumps(key) not in (process.stdout.read() if process.stdout else "")
    finally:
        process.kill()


@pytest.mark.slow
def test_a_key_of_ones_own_is_asked_for_and_not_shown(run, tiny, monkeypatch):
    save(run, tiny, 7)
    monkeypatch.setenv("NANOCHAT_API_KEY", "a-key-of-my-own")
    process, url, lines = start()
    try:
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer a-key-of-my-own"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0 and process.stdout is not None
        assert "a-key-of-my-own" not in "".join(lines) + process.stdout.read()
    finally:
        process.kill()
