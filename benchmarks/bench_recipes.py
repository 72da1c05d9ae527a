"""What the modern recipe costs against v1 on this machine: a training step, and decoding one row, in turn.

    python -m benchmarks.bench_recipes [--shape=4,16,256,4096] [--rounds=3]

Processes of both recipes alternate, so that a slow minute of the machine hits both; shown are medians and their ratio.
"""

import statistics
import sys
from dataclasses import dataclass

from benchmarks.bench_train_step import run
from nanochat_jax.utils import flags
from nanochat_jax.utils.flags import flag

RECIPES = ("v1", "modern")
DECODE = """
import json, sys
from benchmarks.bench_decode import BenchDecodeSettings, through_engine
from benchmarks.common import random_params
from nanochat_jax.inference.engine import Engine
from nanochat_jax.model.config import GPTConfig
depth, vocab, tokens = map(int, sys.argv[2].split(","))
config = GPTConfig.from_depth(depth, vocab, tokens, sys.argv[1])
settings = BenchDecodeSettings()
engine = Engine(config, random_params(config), None, slots=1, steps_per_call=settings.steps_per_call)
through_engine(engine, 1, settings)
print(json.dumps({"seconds": [1 / through_engine(engine, 1, settings) for _ in range(5)]}))
"""


@dataclass(frozen=True)
class BenchRecipesSettings:
    """Flags."""

    shape: str = flag("4,16,256,4096", "depth, rows, tokens per row, vocabulary")
    rounds: int = flag(3, "processes of each recipe")
    steps: int = flag(8, "timed training steps of a process")


def main(s: BenchRecipesSettings) -> None:
    depth, _, tokens, vocab = s.shape.split(",")
    step = [
        sys.executable,
        "-m",
        "benchmarks.bench_train_step",
        "--worker",
        f"--shapes={s.shape}",
        f"--steps={s.steps}",
    ]
    measured = {
        "training step": lambda recipe: run([*step, f"--recipe={recipe}"]),
        "decoding a token": lambda recipe: run([sys.executable, "-c", DECODE, recipe, f"{depth},{vocab},{tokens}"]),
    }
    for name, measure in measured.items():
        seconds: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
        for _ in range(s.rounds):
            for recipe in RECIPES:
                seconds[recipe] += measure(recipe)
        medians = {recipe: statistics.median(found) for recipe, found in seconds.items()}
        shown = ", ".join(f"{recipe} {1e3 * m:,.2f} ms" for recipe, m in medians.items())
        print(f"{name}: {shown}; ratio {medians['modern'] / medians['v1']:.3f}", flush=True)


if __name__ == "__main__":
    main(flags.parse(BenchRecipesSettings, sys.argv[1:], __doc__ or ""))
