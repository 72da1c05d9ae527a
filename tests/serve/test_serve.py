"""The server beside OpenAI's API: health, metrics, the page, failures, swaps, shutdown."""

import asyncio
import dataclasses
import json
import re
import socket
import threading
import time

import openai
import pytest

from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.serve import page
from nanochat_jax.serve.main import make_server
from tests.serve_fixtures import CHAT, HI, serving, toy_engine, toy_params
from tests.tokenizer_fixtures import golden_tokenizer

SPECIAL = golden_tokenizer().encode_special
END = SPECIAL("<|assistant_end|>")


@pytest.fixture(scope="module")
def tiny():
    with serving(toy_engine(pause=0.02)) as running:
        yield running


def test_health_and_stats(tiny):
    health = tiny.http.get("/health").json()
    assert {k: health[k] for k in ("status", "ready", "num_gpus", "available_workers")} == {
        "status": "ok", "ready": True, "num_gpus": 1, "available_workers": 4,
    }  # fmt: skip
    assert tiny.http.get("/stats").json() == {
        "total_workers": 4,
        "available_workers": 4,
        "busy_workers": 0,
        "workers": [{"gpu_id": 0, "device": "cpu"}] * 4,
    }
    stream = tiny.openai().chat.completions.create(
        model="tiny", messages=HI, stream=True, max_tokens=110, n=6, temperature=1.0
    )
    tiny.until(lambda: tiny.http.get("/health").json()["waiting"] == 2)
    assert tiny.http.get("/health").json()["running"] == 4 and tiny.http.get("/stats").json()["busy_workers"] == 4
    stream.close()
    tiny.idle()


def test_metrics(tiny):
    def value(name):
        text = tiny.http.get("/metrics").text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])  # type: ignore[index]

    tiny.post("/v1/completions", prompt="a", max_tokens=2, temperature=0)
    names = ["nanochat_generated_tokens_total", "nanochat_time_to_first_token_seconds_count"]
    names += ["nanochat_time_per_token_seconds_count", "nanochat_prompt_tokens_total"]
    names += ['nanochat_requests_total{code="200",path="/v1/completions"}']
    before = [value(name) for name in names]
    usage = tiny.post("/v1/completions", prompt="abc", max_tokens=9, temperature=0).json()["usage"]
    tiny.post("/nowhere/secret-path")
    gained = [value(name) - old for name, old in zip(names, before, strict=True)]
    assert gained == [9, 1, 9 - 4, usage["prompt_tokens"], 1]
    assert value("nanochat_slots") == 4 and value("nanochat_queue_length") == 0 and value("nanochat_healthy") == 1
    text = tiny.http.get("/metrics").text
    assert "secret-path" not in text and 'path="other"' in text


def test_the_page_may_run_its_own_script_only(tiny):
    answer = tiny.http.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"] == "text/html; charset=utf-8" and answer.content == page.load()[0]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert policy.count("'sha256-") == len(re.findall(r"<(?:script|style)\b", answer.text)) > 0
    assert answer.headers["x-content-type-options"] == "nosniff"
    # one file and nothing else: no other address is named, and nothing turns text into HTML
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)|@import|url\((?!#)""", answer.text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son[a-z]+=\"|\sstyle=\"", answer.text
    )
    assert set(re.findall(r"https?://[\w.]+", answer.text)) == {"http://www.w3.org"}


def test_unknown_addresses_and_an_endpoint_that_breaks(tiny, monkeypatch):
    for answer, status in ((tiny.http.get("/v2"), 404), (tiny.http.get("/v1/completions"), 405)):
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    assert tiny.http.get("/docs").status_code == 404 and tiny.http.get("/openapi.json").status_code == 200
    monkeypatch.setattr(tiny.worker, "submit", lambda *a: 1 / 0)
    answer = tiny.post("/v1/completions", prompt="a")
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "Zero" not in answer.text and "division" not in answer.text  # nothing of the inside


def test_prompts_are_logged_only_if_asked(caplog):
    caplog.set_level("DEBUG", logger="nanochat_jax")
    for asked in (False, True):
        with serving(toy_engine(), log_prompts=asked) as running:
            running.tell([*b"an answer", END])
            running.post("/v1/chat/completions", messages=HI)
        assert ("Hello" in caplog.text) == ("an answer" in caplog.text) == asked


# --- failures -------------------------------------------------------------------------------------


def test_a_failing_step_is_told_to_everyone(caplog):
    engine = toy_engine()
    with serving(engine) as running:
        stream = running.openai().chat.completions.create(model="tiny", messages=HI, stream=True, max_tokens=110)
        next(iter(stream))
        engine.step = lambda *arguments: (_ for _ in ()).throw(RuntimeError("secret detail of the device"))
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "worker_failed" and "secret" not in caught.value.message
        answer = running.post("/v1/chat/completions", messages=HI)
        assert answer.status_code == 500 and "secret" not in answer.text
        health = running.http.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "error" and not health.json()["ready"]
        assert "nanochat_healthy 0.0" in running.http.get("/metrics").text
    assert "secret detail of the device" in caplog.text, "the log says why"


def test_health_answers_while_a_step_takes_its_time():
    engine = toy_engine()
    step, gate = engine.step, threading.Event()
    engine.step = lambda *arguments: (gate.wait(), step(*arguments))[1]
    with serving(engine) as running:
        asking = threading.Thread(target=lambda: running.post("/v1/completions", prompt="a", max_tokens=3))
        asking.start()
        running.until(lambda: running.http.get("/health").json()["waiting"] == 1)
        for _ in range(10):
            assert running.http.get("/health", timeout=5).status_code == 200
        gate.set()
        asking.join()
        running.idle()


def test_the_page_comes_and_requests_wait_while_programs_are_compiled():
    gate = threading.Event()

    def warm_up(told):
        told(1, 4)
        assert gate.wait(60)

    with serving(toy_engine(), warm_up=warm_up) as running:
        running.until(lambda: running.worker.warmed_up > 0)
        assert running.http.get("/").status_code == 200 and running.http.get("/v1/models").status_code == 200
        health = running.http.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "warming up"
        assert health.json()["warmed_up"] == 0.25 and not health.json()["ready"]
        answers = []
        asking = threading.Thread(target=lambda: answers.append(running.post("/v1/completions", prompt="a", n=5)))
        asking.start()
        running.until(lambda: running.http.get("/health").json()["waiting"] == 5)
        assert running.worker.healthy and not answers
        gate.set()
        asking.join()
        assert answers[0].status_code == 200
        health = running.http.get("/health")
        assert health.status_code == 200 and health.json()["status"] == "ok" and health.json()["warmed_up"] == 1


def test_an_engine_is_warmed_up_while_requests_wait():
    engine = toy_engine()
    engine._runner.warm_up = lambda progress: 7  # type: ignore[method-assign]
    engine.submit([1, 2])
    assert engine.warm_up() == 7 and engine.waiting == 1
    engine._admit()
    with pytest.raises(RuntimeError):
        engine.warm_up()


@pytest.mark.parametrize("asked_first", [True, False])
def test_a_server_that_cannot_warm_up_says_so_and_ends(asked_first):
    gate, ended = threading.Event(), threading.Event()

    def warm_up(told):
        assert gate.wait(60)
        raise MemoryError("too little")

    with serving(toy_engine(), warm_up=warm_up) as running:
        running.worker.on_failed_start = ended.set
        answers = []
        asking = threading.Thread(target=lambda: answers.append(running.post("/v1/completions", prompt="a")))
        if asked_first:
            asking.start()
            running.until(lambda: running.worker.waiting == 1)
        gate.set()
        assert ended.wait(60)
        if not asked_first:
            asking.start()
        asking.join()
        assert answers[0].status_code == 500 and answers[0].json()["error"]["code"] == "worker_failed"
        assert (
            isinstance(running.worker.failure, MemoryError) and running.http.get("/health").json()["status"] == "error"
        )


def test_a_server_is_stopped_while_it_warms_up():
    warming, stopped = threading.Event(), []

    def warm_up(told):
        warming.set()
        while True:
            try:
                told(1, 1000)
            except BaseException as error:
                stopped.append(error)
                raise
            time.sleep(0.005)

    with serving(toy_engine(), warm_up=warm_up) as running:
        assert warming.wait(60)
    assert stopped and running.worker.failure is None and running.worker.warmed_up < 1
    assert not running.worker._thread.is_alive()


# --- hanging up, swapping, stopping ---------------------------------------------------------------


def test_the_call_after_an_answer_is_a_short_one_if_a_slot_is_free():
    """Who got it may ask again at once, and is let in as soon as that call is over."""
    engine = toy_engine(slots=2, steps_per_call=16)
    step, log, both_are_in = engine.step, [], threading.Event()

    def watched(*arguments):
        assert both_are_in.wait(60)
        events = step(*arguments)
        if events:
            log.append((arguments[1], any(event.finished for event in events)))
        return events

    engine.step = watched
    with serving(engine) as running:
        worker = running.worker

        async def ask() -> None:
            for n in (5, 100):
                worker.submit([[1, 2]], 1, SamplingParams(n, seed=0))
            both_are_in.set()

        assert worker._loop is not None
        asyncio.run_coroutine_threadsafe(ask(), worker._loop).result()
        running.idle()
    steps, ended = zip(*log, strict=True)
    first = ended.index(True)
    assert steps[first + 1] == 2 and ended.count(True) == 2
    assert {*steps[: first + 1], *steps[first + 2 :]} == {None}, "the others are as long as ever"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(tiny, stream):
    body = json.dumps({"messages": HI, "max_tokens": 110, "stream": stream})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    head += f"\r\nContent-Length: {len(body)}"
    clients = [socket.create_connection(("127.0.0.1", tiny.port)) for _ in range(6)]
    for client in clients:
        client.sendall(f"{head}\r\n\r\n{body}".encode())
    tiny.until(lambda: tiny.worker.running == 4 and tiny.worker.waiting == 2)
    for client in clients:
        client.close()
    tiny.idle()


def test_parameters_are_swapped_between_requests(tiny):
    def ask():
        return tiny.post("/v1/completions", prompt="The sea", max_tokens=40, temperature=0).json()

    old = ask()
    newer = dataclasses.replace(CHAT, step=8)
    running = tiny.openai().completions.create(
        model="tiny", prompt="The sea", max_tokens=40, temperature=0, stream=True
    )
    chunks = [next(iter(running))]
    tiny.worker.replace(toy_params(1), newer)
    new = ask()
    chunks += list(running)
    assert "".join(c.choices[0].text for c in chunks) == old["choices"][0]["text"] != new["choices"][0]["text"]
    assert {c.system_fingerprint for c in chunks} == {"tiny-step-7"}, "it ended with what it began with"
    assert new["system_fingerprint"] == "tiny-step-8" and tiny.http.get("/v1/models").json()["data"][0]["step"] == 8
    tiny.worker.replace(toy_params(0), CHAT)  # also while nothing runs
    tiny.until(lambda: not tiny.worker.swapping)
    assert ask()["choices"] == old["choices"]


def test_shutdown_finishes_what_is_short_and_ends_what_is_long_with_a_last_event(monkeypatch):
    monkeypatch.setattr("nanochat_jax.serve.main.GRACE_S", 0.5)
    engine = toy_engine(pause=0.05)
    long = {"prompt": "a", "stream": True, "n": 3, "max_tokens": 110}
    with serving(engine) as running:
        got: list[str] = []

        def read():
            with running.http.stream("POST", "/v1/completions", json=long) as answer:
                got.extend(answer.iter_text())

        reader = threading.Thread(target=read)
        reader.start()
        running.until(lambda: len(got) > 2)
        short = running.openai().completions.create(model="tiny", prompt="a", max_tokens=12, stream=True)
        first = next(iter(short))
        begin = time.monotonic()
        running.server.should_exit = True
        assert [c.choices[0].finish_reason for c in [first, *short]][-1] == "length"
        reader.join(10)
        assert not reader.is_alive() and time.monotonic() - begin < 5
        text = "".join(got)
        assert "shutting_down" in text and text.endswith("data: [DONE]\n\n")
    assert not running.worker._thread.is_alive() and engine.live == 0


def test_a_signal_is_not_raised_again():
    server = make_server(None, None)
    server.handle_exit(15, None)
    assert server.should_exit and not server.force_exit and not server._captured_signals
    server.handle_exit(2, None)
    assert server.force_exit
