"""Fits the constants of `memory.FIT` to compiled steps: `python -m benchmarks.calibrate_memory`.

Prints them and the error of the formula for every step; needs the CUDA plugin. To be run, and its numbers written into
memory.py, when the training step's memory has changed; tests/planner/test_planner_memory.py holds a few compiled
numbers.
"""

import sys

import numpy as np
from scipy.optimize import nnls

from nanochat_jax.planner import compile as compiled
from nanochat_jax.planner import memory
from nanochat_jax.planner.child import config_of
from nanochat_jax.planner.compile import Case

# (depth, rows, accumulation, remat, gpus, vocabulary, tokens per row)
STEPS = [
    (8, 8, 2, "none", 8, 65536, 2048),
    (8, 32, 2, "none", 8, 65536, 2048),
    (8, 32, 1, "none", 8, 65536, 2048),
    (4, 32, 2, "none", 8, 65536, 2048),
    (12, 8, 4, "none", 8, 65536, 2048),
    (8, 1, 8, "none", 1, 65536, 2048),
    (8, 16, 2, "none", 8, 16384, 1024),
    (20, 16, 2, "none", 8, 65536, 2048),
    (20, 32, 1, "none", 8, 65536, 2048),
    (8, 8, 2, "mlp", 8, 65536, 2048),
    (8, 32, 2, "mlp", 8, 65536, 2048),
    (8, 32, 1, "mlp", 8, 65536, 2048),
    (20, 32, 1, "mlp", 8, 65536, 2048),
    (8, 8, 2, "block", 8, 65536, 2048),
    (8, 32, 2, "block", 8, 65536, 2048),
    (8, 32, 1, "block", 8, 65536, 2048),
    (20, 32, 1, "block", 8, 65536, 2048),
]


def main() -> int:
    cases = [
        Case("step", "h100", gpus, depth, vocab, T, rows, accumulation, remat)
        for depth, rows, accumulation, remat, gpus, vocab, T in STEPS
    ]
    facts = []
    for gpus in (8, 1):  # one call shares its flags, which depend on the number of GPUs
        some = [case for case in cases if case.gpus == gpus]
        found = compiled.results(some, lambda line: print(line, file=sys.stderr, flush=True))
        facts += list(zip(some, found, strict=True))
    names = list(memory.FIT)
    rows = []
    for case, _ in facts:
        sizes = memory.terms(config_of(case), case.rows, memory.Mesh(case.gpus), case.remat)
        rows.append([sizes.get(name, 0.0) for name in names])
    matrix, target = np.array(rows), np.array([f["temporary_bytes"] for _, f in facts], float)
    fit, _ = nnls(matrix / target[:, None], np.ones(len(target)))  # relative errors, sizes not below zero
    print({name: round(float(value), 2) for name, value in zip(names, fit, strict=True)})
    worst = 0.0
    for (case, f), temporaries in zip(facts, matrix @ fit, strict=True):
        total = temporaries + memory.state_bytes(config_of(case), memory.Mesh(case.gpus))
        error = total / f["bytes"] - 1
        worst = max(worst, abs(error))
        gib = 2**30
        print(
            f"depth {case.depth:2}, {case.rows:2} rows x {case.accumulation}, {case.remat:5}, {case.gpus} GPUs: "
            f"compiled {f['bytes'] / gib:6.2f} GiB, formula {total / gib:6.2f} GiB, {error:+.1%}"
        )
    print(f"largest error {worst:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
