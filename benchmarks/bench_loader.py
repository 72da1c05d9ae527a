"""The loader alone, from page cache: how much it can give, how long a consumer of a given speed waits, how soon a
resumed run has its first batch.

    python -m benchmarks.bench_loader [--rows=32768] [--tokens=2048] [--batch=256] [--rate=1e6] [--seconds=20]

Rows of random ids (uint16, as fineweb-edu with a vocabulary of 65,536 has them) are written to a temporary folder and
so into the page cache, shuffled as in training. The consumer asks for a batch, then sleeps until a step at `--rate`
tokens per second would be over: what `next` takes is the data wait that training logs.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np

from nanochat_jax.data.loader import RowLoader
from nanochat_jax.data.row_store import RowSet, RowWriter


def make_rows(folder: str, rows: int, T: int) -> RowSet:
    rng = np.random.default_rng(0)
    with RowWriter(folder, {"what": "random"}, T, np.dtype("<u2")) as writer:
        while writer.rows < rows:
            block = rng.integers(0, 65536, (min(1024, rows - writer.rows), T + 1), np.uint16)
            done = 0
            while done < len(block):
                done += writer.add(block[done:])
                if writer.full:
                    writer.commit(None)
        writer.finish({"tokenizer_hash": "none", "split": "train"})
    return RowSet.open(folder)


def first_batch(loader: RowLoader, step: int) -> float:
    """Seconds from nothing to the batch of a step."""
    began = time.perf_counter()
    with loader.iterate(step) as batches:
        next(batches)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e6)
    parser.add_argument("--seconds", type=float, default=20.0)
    s = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(folder, s.rows, s.tokens)
        size, tokens = s.rows * (s.tokens + 1) * 2, s.batch * s.tokens
        print(f"{s.rows:,} rows of {s.tokens} tokens ({size / 2**20:.0f} MiB), batches of {tokens:,} tokens")
        loader = RowLoader(rows, s.batch, seed=1)

        with loader.iterate() as batches:
            for _ in range(8):
                next(batches)
            count, began = 0, time.perf_counter()
            while time.perf_counter() - began < s.seconds / 2:
                next(batches)
                count += 1
            rate = count * tokens / (time.perf_counter() - began)
        print(f"as fast as it can: {rate / 1e6:.1f} M tokens/s")

        step, waits = tokens / s.rate, []
        with loader.iterate(1000) as batches:
            next(batches)
            for _ in range(max(3, int(s.seconds / step))):
                began = time.perf_counter()
                next(batches)
                waits.append(time.perf_counter() - began)
                time.sleep(max(0.0, step - waits[-1]))
        share = sum(waits) / (len(waits) * step)
        print(
            f"at {s.rate / 1e6:g} M tokens/s ({step:.3f} s a step): data wait {100 * share:.2f} % of the step time, "
            f"median {1e3 * statistics.median(waits):.2f} ms, longest {1e3 * max(waits):.1f} ms"
        )
        for start in (0, 10_000, 1_000_000):
            print(f"first batch of a run that starts at step {start:,}: {first_batch(loader, start):.3f} s")


if __name__ == "__main__":
    main()
