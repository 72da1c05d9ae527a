"""Decoding speed: python -m benchmarks.bench_decode [--cases=d4-v4096,...] [--rows=1,8] [--temperature=0.8 --top_k=50]

Random weights, float32 on CPU, context 2048, a prompt of 16 tokens, then `--tokens` more per row. "engine" is what a
user gets: requests through `Engine.step`, tool and end checks and all host work included. "bare" is the compiled
program alone. Figures are tokens per second over all rows, the best of `--repeats`; the reference's (its own engine in
PyTorch on a machine of this kind, 2 cores) stand beside them.
"""

import sys
import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import random_params
from nanochat_jax.inference import programs
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model import gpt
from nanochat_jax.utils import flags
from nanochat_jax.utils.flags import flag

REFERENCE = {  # (depth, vocabulary, rows): tokens per second of the reference's engine
    (4, 4096, 1): 635,
    (4, 65536, 1): 79,
    (12, 65536, 1): 37,
    (4, 4096, 8): 3107,
    (4, 65536, 8): 596,
    (12, 65536, 8): 117,
}


@dataclass(frozen=True)
class BenchDecodeSettings:
    cases: str = flag("d4-v4096,d4-v65536,d12-v65536", "depth and vocabulary of each model")
    rows: str = flag("1,8", "batch sizes")
    tokens: int = flag(96, "tokens to generate per row")
    repeats: int = flag(4, "how often; the best counts")
    temperature: float = flag(0.0, "0 = greedy")
    top_k: int = flag(0, "0 = off")
    steps_per_call: int | None = flag(None, "None = the engine's own choice")


def through_engine(engine: Engine, rows: int, s: BenchDecodeSettings) -> float:
    """Tokens per second of `rows` requests, from the first decoded call's end to the last token."""
    prompt = list(range(1, 17))
    params = SamplingParams(s.tokens, s.temperature, s.top_k)
    requests = [engine.submit(prompt, replace(params, seed=r)) for r in range(rows)]
    while not all(r.tokens for r in requests):
        engine.step()
    done = sum(len(r.tokens) for r in requests)
    begin = time.perf_counter()
    while any(r.finished is None for r in requests):
        engine.step()
    return (sum(len(r.tokens) for r in requests) - done) / (time.perf_counter() - begin)


def bare(engine: Engine, rows: int, s: BenchDecodeSettings) -> float:
    """Tokens per second of the compiled decode program, called again on the same inputs."""
    steps = engine.steps_per_call
    per_row = np.zeros((rows, programs.N_COLUMNS + steps), np.int32)
    per_row[:, programs.POSITION] = 16
    params = SamplingParams(temperature=s.temperature, top_k=s.top_k)
    per_row[:, programs.TOP_K] = s.top_k
    per_row[:, programs.TEMPERATURE : programs.STOPS] = programs.fractions(params)
    per_row[:, programs.REMAINING] = programs.ENDLESS
    per_row, control = jnp.asarray(per_row), jnp.array([[steps, rows, -1, 0, -1, -1, -1]], jnp.int32)
    row_slots, runner = jnp.arange(rows, dtype=jnp.int32), engine._runner
    begin = time.perf_counter()
    calls = max(1, s.tokens // steps)
    for _ in range(calls):
        out, _, runner.storage = programs.decode(
            engine.model,
            engine.config,
            runner.params,
            runner.storage,
            row_slots,
            per_row,
            control,
            *runner.nothing_adjusted(rows),
            visible=128,
            max_new_steps=steps,
            access=runner._access,
        )
        out.block_until_ready()
    return rows * calls * steps / (time.perf_counter() - begin)


def main(s: BenchDecodeSettings) -> None:
    print(
        f"{jax.devices()[0].device_kind}, temperature {s.temperature:g}, top_k {s.top_k}; tokens per second, all rows"
    )
    print(f"{'model':>12} {'rows':>4} {'engine':>8} {'bare':>8} {'reference':>9} {'ratio':>6}   compile")
    for case in s.cases.split(","):
        depth, vocab = (int(part[1:]) for part in case.split("-"))
        config = gpt.GPTConfig.from_depth(depth, vocab, 2048)
        params = random_params(config)
        for rows in map(int, s.rows.split(",")):
            engine = Engine(config, params, None, slots=rows, steps_per_call=s.steps_per_call)
            begin = time.perf_counter()
            through_engine(engine, rows, s)
            compiling = time.perf_counter() - begin
            speed = max(through_engine(engine, rows, s) for _ in range(s.repeats))
            bare_speed = max(bare(engine, rows, s) for _ in range(s.repeats + 1))
            reference = REFERENCE.get((depth, vocab, rows))
            ratio = f"{reference:9d} {speed / reference:6.2f}" if reference else f"{'-':>9} {'-':>6}"
            print(f"{case:>12} {rows:4d} {speed:8.0f} {bare_speed:8.0f} {ratio}   {compiling:.1f} s", flush=True)


if __name__ == "__main__":
    main(flags.parse(BenchDecodeSettings, sys.argv[1:], __doc__ or ""))
