"""Training steps compiled for GPUs that are not there, as a table: what a change of the step does to its program.

python -m benchmarks.gpu_steps --depths=12,20 --recipes=v1,modern --gpus=8

Bound: every kernel at the slower of the card's two peak rates, one after the other. Expected: the same at the shares of
the peaks in `planner/hlo.py`, with the reduce-scatters. Nothing runs on a GPU.
"""

import sys
from dataclasses import dataclass

from nanochat_jax.hardware.gpus import CARDS
from nanochat_jax.model.gpt import flops_per_token
from nanochat_jax.planner import child, compile
from nanochat_jax.planner.plan import DEFAULTS
from nanochat_jax.utils import errors, flags
from nanochat_jax.utils.flags import flag


@dataclass(frozen=True)
class StepsSettings:
    """Flags of benchmarks.gpu_steps."""

    depths: str = flag("12,20", "depths, comma-separated")
    recipes: str = flag("v1,modern", "recipes, comma-separated")
    gpu: str = flag("h100", f"the card: {', '.join(CARDS)}")
    gpus: int = flag(8, "cards of one node")
    rows: int = flag(32, "rows of 2,048 tokens per device and micro-step")
    accumulation: int = flag(1, "micro-steps per step")
    remat: str = flag("none", "activations recomputed in the backward pass", choices=("none", "mlp", "block"))
    fp8: bool = flag(False, "products of the layers in float8")


HEAD = """| step | kernels | traffic outside products | bound | expected | MFU expected | memory | compiled in |
|---|---|---|---|---|---|---|---|"""


def row(case: compile.Case, facts: dict) -> str:
    seconds, T = facts["expected_seconds"], case.rows * case.T * case.accumulation
    mfu = flops_per_token(child.config_of(case)) * T / seconds / CARDS[case.gpu].bf16_flops
    return (
        f"| {case.recipe} d{case.depth}, {case.rows} x {case.accumulation} rows | {facts['kernels']:,} | "
        f"{facts['other_traffic'] / 1e9:.0f} GB | {1e3 * facts['kernel_seconds']:.0f} ms | {1e3 * seconds:.0f} ms | "
        f"{mfu:.0%} | {facts['bytes'] / 2**30:.1f} GiB | {facts['compile_seconds']:.0f} s |"
    )


def main(argv: list[str]) -> int:
    s = flags.parse(StepsSettings, argv, __doc__ or "", echo=False)
    cases = [
        compile.Case(
            "step", s.gpu, s.gpus, int(depth), DEFAULTS[recipe]["vocab_size"], 2048, s.rows,
            accumulation=s.accumulation, remat=s.remat, recipe=recipe, fp8=s.fp8,
        )
        for recipe in s.recipes.split(",")
        for depth in s.depths.split(",")
    ]  # fmt: skip

    def action() -> None:
        print(HEAD)
        for case in cases:
            print(row(case, compile.results([case], lambda line: print(line, file=sys.stderr, flush=True))[0]))

    return errors.exit_status(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
