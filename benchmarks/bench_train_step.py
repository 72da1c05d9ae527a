"""Training step against the reference architecture under `torch.compile`, in turn on this machine.

    python -m benchmarks.bench_train_step [--torch_python=PATH] [--rounds=3] [--steps=8] [--grads_only]

For every shape, one process of ours and one of `torch_reference.py` alternate `--rounds` times, so that a slow minute
of the machine hits both; each prints the seconds of its steps. Shown are medians over all timed steps, their ratio, and
the best step of each. A step is forward, backward, clipping and both optimizers in float32; `--grads_only` leaves out
clipping and optimizers. `--torch_python` is a Python in which PyTorch is installed (default: this one); without
PyTorch only our side is timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHAPES = ["4,16,256,4096", "2,32,256,4096", "4,1,1024,65536"]  # depth, rows, tokens per row, vocabulary


def time_ours(
    depth: int, rows: int, tokens: int, vocab: int, steps: int, warmup: int, grads_only: bool, recipe: str = "v1"
) -> list[float]:
    """Seconds of every timed step of this project in the present process."""
    from nanochat_jax.hardware import devices

    devices.keep_freed_memory()  # before JAX starts, as the training script does

    import jax
    import numpy as np

    from nanochat_jax.model.gpt import GPTConfig, init
    from nanochat_jax.model.loss import next_token_loss
    from nanochat_jax.parallel.sharding import make_mesh
    from nanochat_jax.training.optim import GRAD_CLIP, OptimHyper, make_optimizer
    from nanochat_jax.training.step import init_state, make_train_step

    config = GPTConfig.from_depth(depth, vocab, tokens, recipe, compute_dtype="float32")
    ids = np.random.default_rng(0).integers(0, vocab, (1, rows, tokens + 1)).astype(np.int32)
    x, y, weights = ids[..., :-1], ids[..., 1:], np.ones((1, rows, tokens), np.float32)
    if grads_only:
        params = init(config, jax.random.key(0))
        gradient = jax.jit(jax.value_and_grad(lambda p, x, y: next_token_loss(config, p, x, y)))

        def step():
            return gradient(params, x[0], y[0])
    else:
        mesh = make_mesh(jax.devices()[:1])
        optimizer = make_optimizer(OptimHyper.of(recipe), 1000, config.n_embd)
        state = init_state(config, optimizer, mesh, jax.random.key(0))
        train_step = make_train_step(config, optimizer, mesh, GRAD_CLIP[recipe])

        def step():
            nonlocal state
            state, metrics = train_step(state, x, y, weights)
            return metrics

    seconds = []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        jax.block_until_ready(step())
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def run(command: list[str]) -> list[float]:
    """Seconds per step as a child process measured them; empty (with its last words shown) if it failed."""
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        print("  " + (done.stderr.strip().splitlines() or ["no message"])[-1], flush=True)
        return []
    return json.loads(done.stdout.strip().splitlines()[-1])["seconds"]


def main():
    parser = argparse.ArgumentParser(description="Training step: nanochat_jax against torch.compile")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="depth,rows,tokens,vocabulary")
    parser.add_argument("--torch_python", default=sys.executable, help="a Python with PyTorch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--grads_only", action="store_true")
    parser.add_argument("--recipe", default="v1", choices=["v1", "modern"], help="of ours")
    parser.add_argument("--worker", action="store_true", help="time ours in this process and print JSON")
    args = parser.parse_args()
    if args.worker:
        depth, rows, tokens, vocab = map(int, args.shapes[0].split(","))
        seconds = time_ours(depth, rows, tokens, vocab, args.steps, args.warmup, args.grads_only, args.recipe)
        print(json.dumps(dict(seconds=seconds)))
        return
    common = [f"--steps={args.steps}", f"--warmup={args.warmup}", *(["--grads_only"] if args.grads_only else [])]
    for shape in args.shapes:
        depth, rows, tokens, vocab = map(int, shape.split(","))
        print(f"depth {depth}, {rows} x {tokens} tokens, vocabulary {vocab}", flush=True)
        sizes = [f"--depth={depth}", f"--batch={rows}", f"--seq={tokens}", f"--vocab={vocab}"]
        ours, theirs = [], []
        for _ in range(args.rounds):
            own = ["--worker", "--shapes", shape, f"--recipe={args.recipe}"]
            ours += run([sys.executable, "-m", "benchmarks.bench_train_step", *own, *common])
            theirs += run([args.torch_python, str(HERE / "torch_reference.py"), *sizes, *common])
        for name, seconds in (("nanochat_jax", ours), ("torch.compile", theirs)):
            if seconds:
                median, best = statistics.median(seconds), min(seconds)
                rates = f"median {rows * tokens / median:8,.0f} tok/s   best {rows * tokens / best:8,.0f} tok/s"
                print(f"  {name:14} {rates}   ({len(seconds)} steps)", flush=True)
        if ours and theirs:
            medians, best = statistics.median(theirs) / statistics.median(ours), min(theirs) / min(ours)
            print(f"  ratio          median {medians:.2f}x   best {best:.2f}x", flush=True)


if __name__ == "__main__":
    main()
