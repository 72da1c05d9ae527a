"""How fast a model answers on this machine: latency, throughput by batch size, and how near that is to the limits.

python -m benchmarks.bench_inference --run=d20-sft         a trained model (default: the newest)
python -m benchmarks.bench_inference --depth=12            random weights of a depth

TTFT: from asking to the first tokens that reach the reader. TPOT: time per further token of a row. The last line of
the output is one JSON object. The definitions are the reference's (its infer_bench), except where said here.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.common import random_params
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model.gpt import GPTConfig, num_params
from nanochat_jax.utils import errors, flags
from nanochat_jax.utils.errors import InputError
from nanochat_jax.utils.flags import flag


@dataclass(frozen=True)
class BenchSettings:
    """The flags of benchmarks.bench_inference."""

    run: str | None = flag(None, "the run to measure; default: the newest")
    model_tag: str | None = flag(None, "another name for --run", short="g")
    stage: str | None = flag(None, "the newest run of this stage", short="i")
    step: int | None = flag(None, "a checkpoint's step; default: the run's newest", short="s")
    depth: int | None = flag(None, "measure random weights of this depth instead of a run")
    vocab_size: int = flag(65536, "their vocabulary")
    sequence_len: int = flag(2048, "their context")
    prompt_tokens: int = flag(512, "tokens of prompt; at most the context allows")
    decode_tokens: int = flag(128, "tokens to generate per row")
    batch_sizes: str = flag("1,2,4,8,16,32", "rows decoded together")
    prompt_lengths: str = flag("32,128,512,2048", "prompts to measure prefill with; those that fit the context")
    temperature: float = flag(0.0, "0 = greedy", short="t")
    top_k: int = flag(0, "0 = off", short="k")
    repeats: int = flag(3, "timed runs per figure, after one that compiles")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "gpu"))

    def __post_init__(self):
        chosen = self.run or self.model_tag or self.stage or self.step is not None
        if self.depth is not None and chosen:
            raise InputError("--depth measures random weights, --run a trained model: give one of them")
        for name in ("prompt_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.decode_tokens < 2:
            raise InputError(f"--decode_tokens must be at least 2, got {self.decode_tokens}")
        numbers(self.batch_sizes, "batch_sizes")
        numbers(self.prompt_lengths, "prompt_lengths")


def numbers(text: str, name: str) -> list[int]:
    """The whole numbers of at least 1 in a text such as "1,2,4". Raises ValueError naming the flag."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise InputError(f"--{name} must be whole numbers of at least 1, such as 1,2,4; got {text!r}")
    return found


# --- what a step must read and compute --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """What decoding costs at least, counted from the config. itemsize: bytes of a number in the compute dtype."""

    config: GPTConfig
    itemsize: int

    def seen(self, context: int) -> list[int]:
        """Per layer, how many keys a token at the end of `context` tokens looks at."""
        windows = (self.config.window(layer) for layer in range(self.config.n_layer))
        return [context if w is None else min(context, w + 1) for w in windows]

    @property
    def linear_params(self) -> int:
        """Parameters that every token is multiplied by: all but the input embedding."""
        return num_params(self.config) - self.config.vocab_size * self.config.n_embd

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights a step reads, whatever the batch (of the input embedding only a row each)."""
        return self.linear_params * self.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes the cache keeps for one token."""
        c = self.config
        return 2 * c.n_layer * c.n_kv_head * c.head_dim * self.itemsize

    def kv_read(self, context: int) -> int:
        """Bytes of cache a row reads for its next token."""
        c = self.config
        return sum(2 * c.n_kv_head * c.head_dim * self.itemsize * n for n in self.seen(context))

    def step_bytes(self, rows: int, context: int) -> int:
        """Bytes a step of `rows` rows must read."""
        return self.weight_bytes + rows * (self.kv_read(context) + self.config.n_embd * self.itemsize)

    def decode_flops(self, context: int) -> int:
        """FLOPs of one token at the end of `context` tokens."""
        c = self.config
        return 2 * self.linear_params + sum(4 * c.n_head * c.head_dim * n for n in self.seen(context))

    def prefill_flops(self, n: int) -> int:
        """FLOPs of reading a prompt of n tokens; the unembedding is needed at its last token only."""
        c = self.config
        head = c.vocab_size * c.n_embd
        total = 2 * (self.linear_params - head) * n + 2 * head
        for window in self.seen(n):
            pairs = window * (window + 1) // 2 + (n - window) * window
            total += 4 * c.n_head * c.head_dim * pairs
        return total


def upper_median(values: Sequence[float]) -> float:
    """The middle value, the larger of two."""
    return statistics.median_high(values)


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """One run: seconds to the first tokens of every row, and (seconds, tokens of a row) of every later call."""

    ttft: float
    calls: list[tuple[float, int]]

    @property
    def per_token(self) -> list[float]:
        return [seconds / n for seconds, n in self.calls]


class Meter:
    """Times an engine with random prompts, each of them new, so that nothing is found in its cache."""

    def __init__(self, engine: Any, settings: BenchSettings):
        self.engine, self.settings = engine, settings
        self._rng = np.random.default_rng(0)

    def run(self, rows: int, prompt_tokens: int, decode_tokens: int) -> Timing:
        """`rows` samples of one prompt (it is read once and shared), until every row has its tokens."""
        s, engine = self.settings, self.engine
        prompt = self._rng.integers(0, engine.config.vocab_size, prompt_tokens).tolist()
        began = time.perf_counter()
        params = SamplingParams(decode_tokens, s.temperature, s.top_k, seed=1)
        requests = [engine.submit(prompt, replace(params, sample_index=i)) for i in range(rows)]
        while not all(request.tokens for request in requests):
            engine.step()
        ttft, calls = time.perf_counter() - began, []
        while any(request.finished is None for request in requests):
            before, start = min(len(r.tokens) for r in requests), time.perf_counter()
            engine.step()
            gained = min(len(r.tokens) for r in requests) - before
            if gained:
                calls.append((time.perf_counter() - start, gained))
        return Timing(ttft, calls)

    def repeated(self, rows: int, prompt_tokens: int, decode_tokens: int) -> list[Timing]:
        """The timed runs, after one that compiles what is needed."""
        self.run(rows, prompt_tokens, decode_tokens)
        return [self.run(rows, prompt_tokens, decode_tokens) for _ in range(self.settings.repeats)]


def summary(timings: Sequence[Timing], rows: int) -> dict[str, float]:
    """ttft_sec (median), tpot_sec (upper median over all calls), tok_per_sec (all rows, first tokens left out)."""
    calls = [call for timing in timings for call in timing.calls]
    seconds, tokens = sum(s for s, _ in calls), sum(n for _, n in calls)
    return {
        "ttft_sec": statistics.median(t.ttft for t in timings),
        "tpot_sec": upper_median([p for t in timings for p in t.per_token]) if calls else 0.0,
        "tok_per_sec": rows * tokens / seconds if calls else 0.0,
        "decode_steps": tokens // max(len(timings), 1),
    }


def measure_bandwidth(n_bytes: int) -> tuple[float, str]:
    """(bytes per second that the first device reads, how that was measured).

    Sums an array again and again, as XLA compiles it. On a CPU the array is as large as what a decode step reads: a
    small model stays in the caches, which are faster than memory, and so does the array. On an accelerator it is 1 GiB.
    """
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    size = min(max(n_bytes, 1 << 20), 1 << 30) if on_cpu else 1 << 30
    array = jax.device_put(jnp.ones(size // 4, jnp.float32), jax.devices()[0])
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    times, began = [], time.perf_counter()
    while len(times) < 10 or time.perf_counter() - began < 1.0:
        start = time.perf_counter()
        total(array).block_until_ready()
        times.append(time.perf_counter() - start)
    what = "as much as a step reads" if on_cpu else "far more than the caches hold"
    return array.nbytes / min(times), f"measured: best of {len(times)} sums over {array.nbytes / 1e6:,.0f} MB, {what}"


def _peak_memory() -> int | None:
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


@dataclass(frozen=True)
class MeasuredModel:
    """What is measured, and how it is called."""

    config: GPTConfig
    params: Any
    source: str
    step: int | None


def load(settings: BenchSettings) -> MeasuredModel:
    """The run's model, or random weights of ordinary size (see `random_params`)."""
    if settings.depth is None:
        from nanochat_jax.runs.checkpoint import load_model

        config, params, _, meta = load_model(settings.run or settings.model_tag, settings.stage, settings.step)
        return MeasuredModel(config, params, meta["run"], meta["step"])
    config = GPTConfig.from_depth(settings.depth, settings.vocab_size, settings.sequence_len)
    return MeasuredModel(config, random_params(config), f"random d{settings.depth}", None)


def bench(settings: BenchSettings) -> dict[str, Any]:
    """Measures, printing a table as it fills, and returns what the JSON line holds."""
    import jax

    from nanochat_jax.hardware.devices import peak_flops
    from nanochat_jax.inference.engine import Engine
    from nanochat_jax.utils.progress import ShareProgress

    model = load(settings)
    config = model.config
    costs = Costs(config, np.dtype(config.dtype).itemsize)
    decode_tokens = min(settings.decode_tokens, max(2, config.sequence_len // 2))
    prompt_tokens = max(1, min(settings.prompt_tokens, config.sequence_len - decode_tokens))
    context = prompt_tokens + decode_tokens // 2
    batches = numbers(settings.batch_sizes, "batch_sizes")
    lengths = [n for n in numbers(settings.prompt_lengths, "prompt_lengths") if n <= config.sequence_len]
    peak, peak_source = peak_flops()
    bandwidth, bandwidth_source = measure_bandwidth(costs.step_bytes(1, context))
    kind = jax.devices()[0].device_kind
    result: dict[str, Any] = {
        "source": model.source,
        "step": model.step,
        "model_config": asdict(config),
        "device": kind,
        "peak_bandwidth_bytes_per_sec": bandwidth,
        "peak_bandwidth_source": bandwidth_source,
        "peak_flops_per_sec": peak,
        "peak_flops_source": peak_source,
        "num_params": num_params(config),
        "compute_dtype": np.dtype(config.dtype).name,
        "weight_bytes": costs.weight_bytes,
        "kv_bytes_per_token": costs.kv_bytes_per_token,
        "kv_read_bytes_per_step": costs.kv_read(context),
        "context_mid": context,
        "decode_flops_per_token": costs.decode_flops(context),
        "ceiling_bs1_tok_per_sec": bandwidth / costs.step_bytes(1, context),
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "sweep": [],
        "prefill": [],
    }
    with ShareProgress("bench") as progress:
        _print_card(result, progress.say)
        rows_total = sum(batches) + len(lengths)
        done = 0
        progress.say(_line("batch", "TTFT ms", "TPOT ms", "tok/s", "MBU %", "MFU %", "peak GiB"))
        for rows in batches:
            progress(f"batch {rows}", done / rows_total)
            engine = Engine(config, model.params, None, slots=rows, capacity=prompt_tokens + decode_tokens)
            # the first call's tokens count as TTFT, so there must be more calls than that
            engine.steps_per_call = min(engine.steps_per_call, max(1, decode_tokens // 4))
            entry: dict[str, Any] = {"batch_size": rows}
            entry |= summary(Meter(engine, settings).repeated(rows, prompt_tokens, decode_tokens), rows)
            del engine  # its cache, before the next one's
            steps_per_s = entry["tok_per_sec"] / rows
            entry["mbu_percent"] = 100 * costs.step_bytes(rows, context) * steps_per_s / bandwidth
            entry["mfu_percent"] = 100 * rows * costs.decode_flops(context) * steps_per_s / peak
            entry["peak_memory_bytes"] = _peak_memory()
            result["sweep"].append(entry)
            progress.say(_sweep_line(entry))
            done += rows
        if lengths:
            progress.say(_line("prompt", "TTFT ms", "", "tok/s", "", "MFU %", ""))
            engine = Engine(config, model.params, None, slots=1, capacity=max(lengths))
            engine.steps_per_call = min(engine.steps_per_call, max(1, decode_tokens // 4))
            meter = Meter(engine, settings)
            for n in lengths:
                progress(f"prompt of {n}", done / rows_total)
                seconds = statistics.median(t.ttft for t in meter.repeated(1, n, 1))
                entry = {"prompt_tokens": n, "time_sec": seconds, "tok_per_sec": n / seconds}
                entry["mfu_percent"] = 100 * costs.prefill_flops(n) / seconds / peak
                result["prefill"].append(entry)
                progress.say(_prefill_line(entry))
                done += 1
    return result


def _print_card(r: dict[str, Any], say) -> None:
    step = "" if r["step"] is None else f", step {r['step']}"
    c = r["model_config"]
    lines = [
        f"{r['source']}{step}: {c['n_layer']} layers, width {c['n_embd']}, vocabulary {c['vocab_size']}, "
        f"{r['num_params'] / 1e6:,.1f} M parameters, {r['compute_dtype']} on {r['device']}",
        f"a token reads {r['weight_bytes'] / 1e6:,.1f} MB of weights and {r['kv_read_bytes_per_step'] / 1e6:,.2f} MB "
        f"of cache (context {r['context_mid']}); the cache keeps {r['kv_bytes_per_token']:,} bytes per token",
        f"MBU = bytes that must be read / {r['peak_bandwidth_bytes_per_sec'] / 1e9:,.1f} GB/s "
        f"({r['peak_bandwidth_source']})",
        f"MFU = FLOPs / {r['peak_flops_per_sec'] / 1e12:,.3g} TFLOP/s ({r['peak_flops_source']})",
        f"so one row cannot exceed {r['ceiling_bs1_tok_per_sec']:,.0f} tok/s; prompts of {r['prompt_tokens']} tokens, "
        f"{r['decode_tokens']} generated; TTFT until tokens reach the reader, one decode call later",
    ]
    say("\n".join(lines))


def _line(*columns: str) -> str:
    return f"{columns[0]:>7}" + "".join(f" {column:>9}" for column in columns[1:])


def _sweep_line(e: dict[str, Any]) -> str:
    memory = e["peak_memory_bytes"]
    return _line(
        str(e["batch_size"]),
        f"{1e3 * e['ttft_sec']:,.1f}",
        f"{1e3 * e['tpot_sec']:,.2f}",
        f"{e['tok_per_sec']:,.0f}",
        f"{e['mbu_percent']:.1f}",
        f"{e['mfu_percent']:.2f}",
        "-" if memory is None else f"{memory / 2**30:.2f}",
    )


def _prefill_line(e: dict[str, Any]) -> str:
    rate, mfu = f"{e['tok_per_sec']:,.0f}", f"{e['mfu_percent']:.2f}"
    return _line(str(e["prompt_tokens"]), f"{1e3 * e['time_sec']:,.1f}", "", rate, "", mfu, "")


def json_line(result: dict[str, Any]) -> str:
    """One line of JSON that any parser takes: what is not a finite number is null."""

    def clean(value):
        if isinstance(value, dict):
            return {key: clean(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(result))


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status (0 fine, 1 no such model or device, 2 bad flags)."""
    settings = flags.parse(BenchSettings, argv, (__doc__ or "").split("\n\n")[0], echo=False)

    def action() -> None:
        from nanochat_jax.hardware import devices

        devices.prepare(settings.device)
        devices.check(settings.device)
        print(json_line(bench(settings)))

    return errors.exit_status(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
