"""Many clients, most of them fickle: nothing of theirs may stay, and /health answers meanwhile."""

import asyncio
import gc
import random
from pathlib import Path

import httpx
import pytest

from nanochat_jax.inference.request import Request
from nanochat_jax.serve.streaming import GrowingCompletion
from nanochat_jax.serve.worker import Generation
from tests.serve_fixtures import HI, serving, toy_engine


def resident() -> float:
    """MiB of memory of this process (Linux), or 0."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0.0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def left_behind() -> int:
    gc.collect()
    return sum(isinstance(o, Request | Generation | GrowingCompletion) for o in gc.get_objects())


async def fickle(client: httpx.AsyncClient, rng: random.Random) -> str:
    """One request that is given up at a random moment, or not."""
    chat = rng.random() < 0.5
    body = {"messages": HI} if chat else {"prompt": "The sea " * rng.randint(1, 8)}
    body |= {"max_tokens": rng.randint(1, 100), "n": rng.choice([1, 1, 1, 3]), "stream": rng.random() < 0.7}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    patience = rng.choice([0.0, 0.001, 0.01, 0.05, 0.2, 60])

    async def ask() -> None:
        async with client.stream("POST", path, json=body) as answer:
            assert answer.status_code in (200, 429)
            async for _ in answer.aiter_bytes():
                pass

    try:
        await asyncio.wait_for(ask(), patience)
        return "answered"
    except TimeoutError:
        return "cancelled"


async def crowd(url: str, count: int, seed: int) -> dict[str, int]:
    rng, outcomes, gate = random.Random(seed), {"answered": 0, "cancelled": 0}, asyncio.Semaphore(24)
    limits = httpx.Limits(max_connections=40)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def one() -> None:
            async with gate:
                outcomes[await fickle(client, rng)] += 1

        await asyncio.gather(*(one() for _ in range(count)))
    return outcomes


def give_up(count: int, rounds: int) -> list[float]:
    """`rounds` times `count` fickle requests; memory after each round."""
    memory = []
    with serving(toy_engine(pause=0.002), queue=40) as running:
        before = left_behind()
        for round in range(rounds):
            outcomes = asyncio.run(crowd(running.url, count, round))
            assert outcomes["answered"] > count // 10 and outcomes["cancelled"] > count // 10
            running.idle()
            running.until(lambda: left_behind() <= before)
            assert not running.worker._running and running.worker.failure is None
            memory.append(resident())
        health = running.http.get("/health").json()
        assert (health["running"], health["waiting"], health["status"]) == (0, 0, "ok")
        assert running.post("/v1/completions", prompt="a", max_tokens=5, temperature=0).status_code == 200
    return memory


def test_requests_given_up_leave_nothing():
    give_up(60, 1)


@pytest.mark.slow
def test_a_thousand_requests_given_up_leave_nothing():
    memory = give_up(250, 4)
    print("resident memory (MiB) after each 250 requests:", *(f"{m:.1f}" for m in memory))
    assert memory[-1] - memory[0] < 12, memory  # 750 requests: under 16 KiB each, the allocator's noise
