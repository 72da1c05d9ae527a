"""Ten minutes on one GPU, for what compiling alone cannot tell: python -m dev.gpu_check --out=DIR

Parts run one after the other, the most valuable first, each in a process of its own with a limit of time. What they
measure stands in DIR/check.json, beside what was predicted where there is a prediction. Nothing is downloaded. With
--tiny the same runs on a CPU, small, to try this script.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.hardware import devices
from nanochat_jax.hardware import gpus as cards
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model import gpt
from nanochat_jax.model.attention import attention as own_attention
from nanochat_jax.model.kv_in_place import by_cudnn, formula
from nanochat_jax.model.layers import look_up as own_look_up
from nanochat_jax.parallel import sharding
from nanochat_jax.planner import fit_batch, hlo
from nanochat_jax.training.execution import norms_refused
from nanochat_jax.training.optim import OptimHyper, make_optimizer
from nanochat_jax.training.step import init_state, make_train_step
from nanochat_jax.utils import flags
from nanochat_jax.utils.flags import flag

ROOT = Path(__file__).resolve().parents[1]
TRITON, GRAPHS = "--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_command_buffer=-WHILE"
# (part and its arguments, limit in seconds, flags of XLA that differ from those the project sets)
PARTS: list[tuple[list[str], int, str]] = [
    (["attention"], 100, ""),
    (["decode_attention"], 60, ""),
    (["look_up"], 60, ""),
    (["step", "20", "32"], 150, ""),
    (["decode", "12", "32"], 120, ""),
    (["resume"], 180, ""),
    (["step", "20", "32", "float8"], 150, ""),
    (["step", "20", "32", "auto", "unfused"], 150, ""),
    (["step", "20", "32"], 150, TRITON),
    (["decode", "12", "32"], 120, GRAPHS),
    (["step", "2", "32"], 60, ""),  # taken from the first: the time of a layer
]
TINY: list[tuple[list[str], int, str]] = [
    (["attention"], 120, ""),
    (["decode_attention"], 120, ""),
    (["look_up"], 120, ""),
    (["step", "1", "2"], 180, ""),
    (["decode", "1", "2"], 240, ""),
]


@dataclass(frozen=True)
class CheckSettings:
    """Flags of dev.gpu_check."""

    out: Path = flag(Path("gpu_check"), "folder for check.json, logs and runs")
    budget: float = flag(560.0, "seconds for everything")
    tiny: bool = flag(False, "small, on a CPU")
    part: str = flag("", "one part alone, in this process: its name and arguments, comma-separated")


def main(argv: list[str]) -> int:
    """Exit status: 0 every part ended well, 1 one did not."""
    settings = flags.parse(CheckSettings, argv, __doc__ or "", echo=False)
    if settings.part:
        name, *arguments = settings.part.split(",")
        devices.prepare("cpu" if settings.tiny else "gpu", alone=name == "step", decodes=name == "decode")
        for facts in _PARTS[name](settings.tiny, *arguments):
            print(json.dumps(facts), flush=True)
        return 0
    settings.out.mkdir(parents=True, exist_ok=True)
    results, began = [], time.monotonic()
    for part, limit, xla in TINY if settings.tiny else PARTS:
        left = settings.budget - (time.monotonic() - began)
        if left < 20:
            print(f"out of time before {part}", flush=True)
            break
        results.append(_run(settings, part, min(limit, left), xla))
        print(json.dumps(results[-1]), flush=True)
        (settings.out / "check.json").write_text(json.dumps(results, indent=1))
    return int(any(result["status"] for result in results))


def _run(settings: CheckSettings, part: list[str], limit: float, xla: str) -> dict[str, Any]:
    """One part in a process of its own: its lines, how it ended, how long it took."""
    command = [sys.executable, "-m", "dev.gpu_check", f"--part={','.join(part)}", f"--tiny={settings.tiny}"]
    env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla}".strip()}
    env["NANOCHAT_BASE_DIR"] = str(settings.out / "base")
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit)
        status, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        status, output, errors = 124, _text(error.stdout), _text(error.stderr)
    (settings.out / f"{'-'.join(part)}{'-other-flags' if xla else ''}.log").write_text(f"{output}\n{errors}")
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    took = round(time.monotonic() - began, 1)
    facts = {"part": part, "xla": xla, "status": status, "seconds": took, "found": found}
    return facts if not status else {**facts, "errors": errors[-1500:]}


def _text(output: Any) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def median_seconds(run: Callable[[], Any], times: int = 5) -> float:
    jax.block_until_ready(run())
    found = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - began)
    return sorted(found)[times // 2]


def _error(ours, exact) -> float:
    ours, exact = (np.asarray(x, np.float64).ravel() for x in (ours, exact))
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


# ---------------------------------------------------------------------------------------------------------------------
# the parts


def attention(tiny: bool):
    """Attention of training, with its gradients, against float32: grouped heads, windows, odd and short lengths."""
    shapes = [(4, 2048, 10, 10, None), (4, 2048, 10, 2, None), (4, 2048, 10, 2, 512), (2, 577, 10, 10, None)]
    for B, T, H, G, window in [(1, 33, 2, 1, 8)] if tiny else shapes:
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, d = (jax.random.normal(key, (B, T, n, 128)) for key, n in zip(keys, (H, G, G, H), strict=True))

        def run(q, k, v, d, window=window):
            y, back = jax.vjp(lambda q, k, v: own_attention(q, k, v, window=window), q, k, v)
            return y, *back(d)

        low = [x.astype(jnp.bfloat16) for x in (q, k, v, d)]
        ours = jax.jit(run)
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(run)(*(x.astype(jnp.float32) for x in low))
        errors = [_error(a, b) for a, b in zip(ours(*low), exact, strict=True)]
        facts = dict(shape=[B, T, H, G], window=window, errors=errors, expected_error=4e-3)
        yield {**facts, "ms": 1e3 * median_seconds(lambda ours=ours, low=low: ours(*low))}


def decode_attention(tiny: bool):
    """Attention of decoding, its lengths data, against the formula: one, five, ten query heads to a head of keys."""
    shapes = [(32, 10, 1, 2112), (32, 2, 5, 2112), (32, 1, 10, 2112)]
    for B, G, R, S in [(3, 2, 2, 40)] if tiny else shapes:
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v = (
            jax.random.normal(key, (B, G, n, 128), jnp.bfloat16) for key, n in zip(keys, (R, S, S), strict=False)
        )
        seen = jax.random.randint(keys[3], (B,), 1, S + 1)
        ours, exact = (jax.jit(way) for way in (formula if tiny else by_cudnn, formula))
        facts = dict(shape=[B, G, R, S], error=_error(ours(q, k, v, seen), exact(q, k, v, seen)), expected_error=4e-3)
        yield {**facts, "ms": 1e3 * median_seconds(lambda ours=ours, inputs=(q, k, v, seen): ours(*inputs))}


def look_up(tiny: bool):
    """The gradient of an embedding, for ids as frequent as words are: error and time, of all and of the most frequent
    token; beside a look-up that casts the table first."""
    V, C, N = (512, 64, 256) if tiny else (65536, 1280, 65536)
    frequency = 1 / np.arange(1, V + 1)
    ids = np.random.default_rng(0).choice(V, N, p=frequency / frequency.sum()).astype(np.int32)
    table = jax.random.normal(jax.random.key(0), (V, C))
    d = jax.random.normal(jax.random.key(1), (N, C), jnp.bfloat16)
    exact, top = np.zeros((V, C)), int(np.bincount(ids).argmax())
    np.add.at(exact, ids, np.asarray(d, np.float64))
    ways = dict(rows_cast=lambda w: own_look_up(w, ids, jnp.bfloat16), table_cast=lambda w: w.astype(jnp.bfloat16)[ids])
    for name, way in ways.items():
        gradient = jax.jit(lambda w, d, way=way: jax.vjp(way, w)[1](d)[0])
        found = np.asarray(gradient(table, d), np.float64)
        errors = dict(error=_error(found, exact), error_of_top=_error(found[top], exact[top]))
        yield dict(way=name, **errors, ms=1e3 * median_seconds(lambda gradient=gradient: gradient(table, d)))


def step(tiny: bool, depth: str, rows: str, dtype: str = "auto", norms: str = "fused"):
    """The training step on random tokens: compile time, time, memory, utilisation, losses; predictions from the text of
    the same program."""
    V, T = (512, 64) if tiny else (65536, 2048)
    width = {} if tiny else dict(n_embd=1280, n_head=10, n_kv_head=10)  # two layers are two of depth 20
    config = gpt.GPTConfig.from_depth(int(depth), V, T, compute_dtype=dtype, **width)
    mesh = sharding.make_mesh(jax.devices()[:1])
    refused = norms_refused(config, mesh.devices.flat[0], wanted=norms == "fused")
    config = dataclasses.replace(config, fused=not refused)
    optimizer = make_optimizer(OptimHyper(), 1000, config.n_embd)
    train_step = make_train_step(config, optimizer, mesh, guarded=True)
    state = init_state(config, optimizer, mesh, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, V, (1, int(rows), T + 1)).astype(np.int32)
    batch = ids[..., :-1], ids[..., 1:], np.ones((1, int(rows), T), np.float32), np.full((2,), np.inf, np.float32)
    began = time.perf_counter()
    compiled = train_step.lower(state, *batch).compile()
    compile_seconds = time.perf_counter() - began
    losses, times = [], []
    for _ in range(8):
        began = time.perf_counter()
        state, metrics = compiled(state, *batch)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - began)
    seconds = sorted(times[2:])[3]
    card = cards.of_device(jax.devices()[0].device_kind)
    counts, analysis = hlo.count(compiled.as_text() or ""), compiled.memory_analysis()
    flops = gpt.flops_per_token(config) * int(rows) * T
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    yield {
        "layers": config.n_layer,
        "compile_s": compile_seconds,
        "ms": 1e3 * seconds,
        "bound_ms": 1e3 * counts.kernel_seconds(card.bf16_flops, card.memory_bandwidth) if card else None,
        "mfu": flops / seconds / card.bf16_flops if card else None,
        "kernels": sum(kernel.times for kernel in counts.kernels),
        "planned_gib": fit_batch.bytes_needed(analysis) / 2**30 if analysis else None,
        "peak_gib": peak / 2**30 if peak else None,
        "losses": losses,
    }


def decode(tiny: bool, depth: str, slots: str):
    """The engine, greedy and with top-k 50: time to the first token, time of a token, seconds until it is warm."""
    V, T, prompt, new = (512, 64, 20, 8) if tiny else (65536, 2048, 300, 128)
    config = gpt.GPTConfig.from_depth(int(depth), V, T)
    params = jax.jit(lambda key: gpt.init(config, key))(jax.random.key(0))
    began = time.perf_counter()
    engine = Engine(config, params, slots=int(slots), capacity=prompt + new)
    programs = engine.warm_up()
    yield dict(programs=programs, warm_up_s=time.perf_counter() - began)
    for name, temperature, top_k in (("greedy", 0.0, 0), ("top_k 50", 1.0, 50)):
        rng = np.random.default_rng(top_k)
        sampling = SamplingParams(new, temperature, top_k)
        began = time.perf_counter()
        requests = [engine.submit(rng.integers(0, V, prompt).tolist(), sampling) for _ in range(int(slots))]
        while not all(request.tokens for request in requests):
            engine.step()
        first = time.perf_counter() - began
        before = sum(len(request.tokens) for request in requests)
        while engine.live:
            engine.step()
        each = (time.perf_counter() - began - first) * int(slots)
        tokens = sum(len(request.tokens) for request in requests) - before
        yield dict(sampling=name, first_token_ms=1e3 * first, ms_per_token=1e3 * each / max(1, tokens))


def resume(tiny: bool):
    """A demo run that is killed and resumed, finetuning, rollouts and an evaluation: whether each command ends well."""
    train = [sys.executable, "-m", "scripts.train", "--demo", "--device=gpu"]
    base = [*train, "--stage=base", "--num_iterations=60", "--save_every=10", "--run_name=g"]
    subprocess.run([sys.executable, "-m", "scripts.tok_train", "--demo", "--vocab_size=1024"], cwd=ROOT, check=True)
    killed = subprocess.Popen(base, cwd=ROOT)
    time.sleep(60)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    commands = {
        "resumed": base,
        "sft": [*train, "--stage=sft", "--source=g", "--run_name=s", "--num_iterations=20"],
        "rl": [*train, "--stage=rl", "--source=s", "--run_name=r", "--num_iterations=3", "--eval_examples=20"],
        "evaluation": [sys.executable, "-m", "scripts.eval", "--source=sft", "--max_problems=20"],
    }
    for name, command in commands.items():
        began = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
        yield dict(command=name, status=status, seconds=round(time.monotonic() - began, 1))


_PARTS: dict[str, Callable[..., Any]] = dict(
    attention=attention, decode_attention=decode_attention, look_up=look_up, step=step, decode=decode, resume=resume
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
