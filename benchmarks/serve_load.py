"""The server under load: python -m benchmarks.serve_load [--run=NAME | --depth=12]

Starts `python -m scripts.serve` in a process of its own and talks to it over HTTP as its users do, with a trained run
(default: the newest) or random weights. Figures, each with its target:

* tokens per second of all streams together, one stream against many (at least 4 times as much with 32);
* the slowest stream's time against the median's (at most 2);
* how long /health takes meanwhile, 99th percentile (under 100 ms);
* a single stream over HTTP against the same engine stepped in this process, in turn (within 15 %), and against an
  engine of one slot, which shows what idle slots cost;
* what vLLM's serving benchmark reports, under its names: requests and tokens per second, TTFT, TPOT and ITL at p50 and
  p99 (of streams that began and ended in the time measured, so their rates are a little below the server's);
* requests cancelled at random: slots and queue empty afterwards, and how the server's memory grows.

Streams are completions of up to `--tokens` tokens; a trained model may end some earlier. Each client asks for the next
as soon as it has one, so there are always as many streams as is said; the server's own count of tokens is read before
and after `--seconds` of that, or as long as every client takes for one more answer. The clients share the machine with
the server, so they are written against sockets (`streams.py`). The last line of the output is one JSON object.
"""

import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import streams as clients
from benchmarks.common import random_params
from benchmarks.streams import VLLM_FIGURES, Connection, Stream, alone, as_vllm, body, percentile, stream
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.utils import flags, paths
from nanochat_jax.utils.flags import flag


@dataclass(frozen=True)
class ServeLoadSettings:
    run: str | None = flag(None, "the run to serve; default: the newest")
    depth: int | None = flag(None, "serve random weights of this depth instead")
    vocab_size: int = flag(65536, "their vocabulary")
    sequence_len: int = flag(512, "their context")
    streams: int = flag(32, "concurrent streams")
    slots: int | None = flag(None, "the server's slots; default: as many as streams")
    tokens: int = flag(128, "tokens per stream")
    rounds: int = flag(3, "how often one stream and all of them are measured, in turn; the median counts")
    seconds: float = flag(5.0, "how long each time")
    cancels: int = flag(1000, "requests to cancel at random, 0 = leave that out")
    seed: int = flag(0, "of the cancellations")
    extra: str = flag("{}", 'fields of every request beside its own, as JSON: {"logprobs": 5}')
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "gpu"))


# --- arithmetic -------------------------------------------------------------------------------------------------------


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least squares: how much y grows with x."""
    return statistics.linear_regression(xs, ys).slope if len(set(xs)) > 1 else 0.0


def metric(text: str, name: str) -> float:
    """A number in Prometheus' text format. Raises ValueError where there is none of that name."""
    found = re.search(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no metric {name}")
    return float(found.group(1))


def fairness(streams: Sequence[Stream]) -> dict[str, float]:
    """How evenly streams that ran together were served."""
    longest = max(s.tokens for s in streams)
    full = [s.seconds for s in streams if s.tokens == longest]
    times = full if len(full) >= 3 else [s.per_token for s in streams]
    return {
        "first_median_sec": statistics.median(s.first for s in streams),
        "first_max_sec": max(s.first for s in streams),
        "stream_median_sec": statistics.median(s.seconds for s in streams),
        "slowest_to_median": max(times) / statistics.median(times),
        "streams_measured": len(streams),
        "full_streams": len(full),
    }


# --- the server -------------------------------------------------------------------------------------------------------


def random_run(folder: Path, s: ServeLoadSettings) -> str:
    """A run of random weights in the base directory `folder`; returns its name."""
    from nanochat_jax.model.gpt import GPTConfig
    from nanochat_jax.runs import checkpoint
    from nanochat_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

    n = s.vocab_size - len(SPECIAL_TOKENS)
    ranks = [bytes([i]) for i in range(256)] + [b"%x" % i for i in range(16, 16 + n - 256)]  # any distinct bytes do
    tokenizer = Tokenizer(ranks, {name: n + i for i, name in enumerate(SPECIAL_TOKENS)})
    config = GPTConfig.from_depth(s.depth or 1, s.vocab_size, s.sequence_len)
    run = folder / "runs" / f"random-d{s.depth}"
    run.mkdir(parents=True)
    tokenizer.save(run)
    meta = {"config": checkpoint.config_to_dict(config), "stage": "base", "tokenizer_hash": tokenizer.hash}
    checkpoint.save(run, 0, {"params": random_params(config)}, meta)
    return run.name


class Server:
    """The real server in a process of its own; a context manager."""

    def __init__(self, run: str | None, slots: int, device: str):
        command = [sys.executable, "-m", "scripts.serve", "--port=0", f"--slots={slots}", "--queue=1000"]
        command += [f"--device={device}", *([f"--run={run}"] if run else [])]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | _UNBUFFERED)
        self.address = ""

    def __enter__(self) -> "Server":
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(f"  server: {line}", end="", flush=True)
            if found := re.search(r"ready at (http://\S+)", line):
                self.address = found.group(1)
                threading.Thread(target=self.process.stdout.read, daemon=True).start()  # its pipe must not fill up
                return self
        raise RuntimeError(f"the server ended with status {self.process.wait()} before it was ready")

    def __exit__(self, *exc) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise RuntimeError("the server did not stop within 30 s of SIGTERM") from None

    def rss(self) -> int | None:
        """Bytes of memory it holds; None where the system does not say."""
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
        return None


_UNBUFFERED = {"PYTHONUNBUFFERED": "1"}


class HealthWatch:
    """Asks /health again and again from a thread of its own; `times` in seconds."""

    def __init__(self, address: str, every: float = 0.02):
        self.times: list[float] = []
        self._address, self._every, self._stop = address, every, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        connection = http.client.HTTPConnection(self._address.removeprefix("http://"), timeout=30)
        while not self._stop.is_set():
            began = time.perf_counter()
            connection.request("GET", "/health")
            with connection.getresponse() as response:
                if response.status != 200:
                    raise RuntimeError(f"/health: status {response.status}")
                response.read()
            self.times.append(time.perf_counter() - began)
            time.sleep(self._every)
        connection.close()

    def __enter__(self) -> "HealthWatch":
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()
        self._thread.join()


# --- the clients ------------------------------------------------------------------------------------------------------


async def generated(address: str) -> float:
    """How many tokens the server has generated so far."""
    connection = Connection(address)
    try:
        text = b"".join([piece async for piece in connection.request("GET", "/metrics")]).decode()
    finally:
        connection.close()
    return metric(text, "nanochat_generated_tokens_total")


async def crowd(
    address: str, n: int, tokens: int, numbers: Iterator[int], seconds: float
) -> tuple[list[Stream], float, float]:
    """n streams at any time; (those that began and ended in the seconds measured, tokens per second, the seconds)."""
    measuring = over = False
    warm, done = asyncio.Barrier(n + 1), asyncio.Barrier(n + 1)
    inside: list[Stream] = []

    async def one() -> None:
        connection = Connection(address)
        background: list[asyncio.Task] = []

        def arrive(barrier: asyncio.Barrier) -> None:  # the others are not waited for
            background.append(asyncio.ensure_future(barrier.wait()))

        await stream(connection, next(numbers), tokens)  # connections, caches, the mix of lengths
        arrive(warm)
        measured = False
        while not over:
            counts = measuring
            found = await stream(connection, next(numbers), tokens)
            if counts and not over:
                inside.append(found)
                if not measured:
                    arrive(done)
                measured = True
        connection.close()
        await asyncio.gather(*background)

    clients = asyncio.gather(*(one() for _ in range(n)))

    async def all_of(barrier: asyncio.Barrier) -> None:
        waiting = asyncio.ensure_future(barrier.wait())
        await asyncio.wait([waiting, clients], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            clients.result()  # a client failed: raises what it did

    await all_of(warm)
    measuring, before, began = True, await generated(address), time.perf_counter()
    await asyncio.sleep(seconds)
    await all_of(done)
    tokens_then, took = await generated(address), time.perf_counter() - began
    rate = (tokens_then - before) / took
    over = True
    await clients
    return inside, rate, took


async def cancel_many(
    address: str, count: int, at_once: int, tokens: int, patience: float, seed: int, tick: Callable[[int], None]
) -> dict[str, int]:
    """`count` requests, most of them dropped after a random time of at most `patience` seconds: while they wait, while
    their prompt is read, while they stream. Some are short enough to end. Returns how many did what."""
    rng = random.Random(seed)
    plan = [(rng.choice((4, tokens, tokens)), patience * rng.uniform(0, 1) ** 2) for _ in range(count)]
    left, done = iter(enumerate(plan)), 0
    ended = {"cancelled": 0, "finished": 0}

    async def client_loop() -> None:
        nonlocal done
        connection = Connection(address)
        for number, (length, seconds) in left:
            try:
                await asyncio.wait_for(stream(connection, number, length), seconds)
                ended["finished"] += 1
            except TimeoutError:
                ended["cancelled"] += 1
            done += 1
            tick(done)
        connection.close()

    await asyncio.gather(*(client_loop() for _ in range(at_once)))
    return ended


async def settled(address: str, within: float = 10.0) -> dict[str, float]:
    """Slots busy and requests queued, once both are zero or after `within` seconds."""
    deadline = time.monotonic() + within
    connection = Connection(address)
    while True:
        text = b"".join([piece async for piece in connection.request("GET", "/metrics")]).decode()
        found = {"busy": metric(text, "nanochat_slots_busy"), "queued": metric(text, "nanochat_queue_length")}
        if not any(found.values()) or time.monotonic() > deadline:
            connection.close()
            return found
        await asyncio.sleep(0.05)


class Bare:
    """The same model and slots in this process: what a single stream costs without a server."""

    def __init__(self, run: str | None, slots: int):
        from nanochat_jax.inference.engine import Engine
        from nanochat_jax.runs.checkpoint import load_model

        config, params, self.tokenizer, _ = load_model(run)
        self.engine = Engine(config, params, self.tokenizer, slots=slots)

    def stream(self, number: int, tokens: int) -> Stream:
        """What `stream` asks of the server, of the engine itself."""
        asked = body(number, tokens)
        prompt = [self.tokenizer.bos_id, *self.tokenizer.encode_text(asked["prompt"])]
        began = time.perf_counter()
        params = SamplingParams(tokens, asked["temperature"], top_k=50, seed=asked["seed"])
        request = self.engine.submit(prompt, params)
        first = None
        while request.finished is None:
            self.engine.step()
            first = first or (time.perf_counter() if request.tokens else None)
        ended = time.perf_counter()
        return Stream((first or ended) - began, ended - began, len(request.tokens), request.finished)


# --- all of it --------------------------------------------------------------------------------------------------------


def measure(s: ServeLoadSettings, run: str | None) -> dict[str, Any]:
    """Runs all measurements, printing progress; returns the figures of the JSON line."""
    slots = s.slots or s.streams
    numbers = iter(range(1 << 30))
    result: dict[str, Any] = {"run": run or "newest", "slots": slots, "streams": s.streams, "tokens": s.tokens}

    def say(text: str) -> None:
        print(text, flush=True)

    def go(work: Awaitable) -> Any:
        return asyncio.run(work)  # type: ignore[arg-type]

    with Server(run, slots, s.device) as server:
        singles, crowds, health = [], [], []
        for n in range(s.rounds):
            singles.append(go(crowd(server.address, 1, s.tokens, numbers, s.seconds))[1])
            with HealthWatch(server.address) as watch:
                streams, rate, seconds = go(crowd(server.address, s.streams, s.tokens, numbers, s.seconds))
            crowds.append(figures := {"tok_per_sec": rate} | fairness(streams) | as_vllm(streams, seconds))
            health += watch.times
            say(
                f"round {n + 1}/{s.rounds}: one stream {singles[-1]:,.0f} tok/s, {s.streams} streams {rate:,.0f} "
                f"tok/s, slowest/median {figures['slowest_to_median']:.2f}"
            )
        result["one_tok_per_sec"] = statistics.median(singles)
        for key in crowds[0]:
            result[f"many_{key}"] = statistics.median(figures[key] for figures in crowds)
        result["throughput_ratio"] = result["many_tok_per_sec"] / result["one_tok_per_sec"]
        result["health_p99_ms"] = 1e3 * percentile(health, 99)
        result["health_requests"] = len(health)

        say("single stream against the bare engine, in turn ...")
        pairs = {slots: Bare(run, slots), 1: Bare(run, 1)}
        for bare in pairs.values():
            bare.stream(next(numbers), s.tokens)  # compiles
        http, rates = [], {n: [] for n in pairs}
        for _ in range(max(5, s.rounds)):
            number = next(numbers)
            one = go(alone(server.address, s.tokens, number))
            http.append(one.tokens / one.seconds)
            for n, bare in pairs.items():
                same = bare.stream(number, s.tokens)
                rates[n].append(same.tokens / same.seconds)
        result["single_http_tok_per_sec"] = statistics.median(http)
        result["single_bare_tok_per_sec"] = statistics.median(rates[slots])
        result["single_bare_one_slot_tok_per_sec"] = statistics.median(rates[1])
        for key, bare_rates in (("http_to_bare", rates[slots]), ("http_to_bare_one_slot", rates[1])):
            result[key] = statistics.median(a / b for a, b in zip(http, bare_rates, strict=True))
        del pairs

        if s.cancels:
            say(f"{s.cancels} requests, cancelled at random ...")
            memory: list[tuple[int, int]] = []

            def tick(done: int) -> None:
                rss = server.rss()
                if done % max(1, s.cancels // 50) == 0 and rss is not None:
                    memory.append((done, rss))
                if done % max(1, s.cancels // 5) == 0:
                    say(f"  {done}/{s.cancels}" + ("" if rss is None else f", server holds {rss / 1e6:,.0f} MB"))

            with HealthWatch(server.address) as watch:
                patience = 1.5 * result["many_stream_median_sec"]
                work = cancel_many(server.address, s.cancels, 2 * slots, s.tokens, patience, s.seed, tick)
                result["cancel"] = go(work)
            result["cancel"] |= go(settled(server.address))
            result["cancel"]["health_p99_ms"] = 1e3 * percentile(watch.times, 99)
            later = memory[len(memory) // 2 :]  # the first half fills caches
            result["cancel"]["rss_bytes_per_request"] = slope([n for n, _ in later], [m for _, m in later])
            after = go(alone(server.address, s.tokens, next(numbers)))
            result["cancel"]["answers_afterwards"] = after.tokens > 0
    return result


def verdicts(r: dict[str, Any]) -> list[str]:
    """Each target, the figure and whether it is reached."""
    found = [
        ("throughput, many/one", r["throughput_ratio"], 4.0, "at least"),
        ("slowest/median stream", r["many_slowest_to_median"], 2.0, "at most"),
        ("/health p99, ms", r["health_p99_ms"], 100.0, "at most"),
        ("one stream, HTTP/bare", r["http_to_bare"], 0.85, "at least"),
        ("the same, bare: one slot", r["http_to_bare_one_slot"], 0.85, "at least"),
    ]
    if "cancel" in r:
        found += [("slots busy afterwards", r["cancel"]["busy"], 0.0, "at most")]
        found += [("queued afterwards", r["cancel"]["queued"], 0.0, "at most")]
    lines = [f"{name:<26} {r[f'many_{name}']:>9.2f}" for name in VLLM_FIGURES if f"many_{name}" in r]
    for name, value, target, sense in found:
        reached = value >= target if sense == "at least" else value <= target
        lines.append(f"{name:<26} {value:>9.2f}   {sense} {target:g}: {'reached' if reached else 'MISSED'}")
    if "cancel" in r:
        lines.append(f"{'memory per request, bytes':<26} {r['cancel']['rss_bytes_per_request']:>9,.0f}")
    return lines


def main(argv: Sequence[str]) -> int:
    s = flags.parse(ServeLoadSettings, argv, (__doc__ or "").split("\n\n")[0], echo=False)
    if s.run and s.depth:
        print("error: --depth serves random weights, --run a trained model: give one of them", file=sys.stderr)
        return 2
    clients.EXTRA.update(json.loads(s.extra))
    with contextlib.ExitStack() as stack:
        run = s.run
        if s.depth:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            cache = str(paths.base_dir() / "compile_cache")
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
            os.environ[paths.BASE_DIR_VARIABLE] = str(folder)
            run = random_run(folder, s)
        from nanochat_jax.hardware import devices

        devices.prepare(s.device)
        result = measure(s, run)
    print("\n".join(verdicts(result)))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
