"""Programs compiled for a GPU that is not there, in a process of their own: flags must be set before JAX starts.

    programs = compile_for("h100", 1, ["train_step", "decode"])     {name: Program}

What can be compiled is a function below, from a list of devices to something lowered. Models are small, their heads of
real width.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax.hardware.gpus import CARDS
from nanochat_jax.model.config import MODERN
from nanochat_jax.planner import compile as compiler
from nanochat_jax.planner import hlo
from tests import children

ROOT = Path(__file__).resolve().parent.parent
T, ROWS, SLOTS = 255, 4, 32  # an odd length, which cuDNN's attention does not take by itself


@dataclass(frozen=True)
class Program:
    """The scheduled HLO of one device, bytes, and what the host does to run it (of decoding): a line for each thing."""

    text: str
    temporary: int
    aliased: int
    arguments: int
    launches: list[str]

    @property
    def kernels(self) -> int:
        """How many kernels there are in the text, loops counted once."""
        return sum(kernel.times for kernel in hlo.count(self.text).kernels)


def compile_for(gpu: str, gpus: int, names: list[str], decodes: bool = False) -> dict[str, Program]:
    """Compiles the named programs for so many cards, with the flags of training, or of that and decoding."""
    env = {**compiler.environment(CARDS[gpu], gpus, decodes), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as dump:
        if decodes:
            env["XLA_FLAGS"] += f" --xla_dump_to={dump}"
        command = [sys.executable, "-m", "tests.gpu_programs", gpu, str(gpus), dump, *names]
        done = children.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: Program(**facts) for name, facts in json.loads(done.stdout).items()}


def config(**overrides: Any):
    from nanochat_jax.model.gpt import GPTConfig

    shape = dict(sequence_len=T, vocab_size=4096, n_layer=2, n_head=4, n_kv_head=2, n_embd=512)
    return GPTConfig.modern(**{**shape, "compute_dtype": "bfloat16", "attention": "cudnn", **overrides})


def train_step(devices, fsdp: int = 1, **overrides):
    from nanochat_jax.parallel import sharding
    from nanochat_jax.planner import fit_batch
    from nanochat_jax.training.optim import OptimHyper, make_optimizer
    from nanochat_jax.training.step import make_train_step

    mesh, model = sharding.make_mesh(devices, fsdp), config(**{"fused": True, **overrides})
    optimizer = make_optimizer(OptimHyper.of("modern", ns_dtype="bfloat16"), 100, model.n_embd)
    step = make_train_step(model, optimizer, mesh, guarded=True)
    return fit_batch.lower_step(step, model, optimizer, mesh, rows=ROWS, accumulation=2, T=model.sequence_len)


def train_step_fsdp(devices):
    return train_step(devices, fsdp=len(devices))


def train_step_float8(devices):
    return train_step(devices, compute_dtype="float8")


def gradients(devices, **overrides):
    """Of a model of one layer on one device, with an even length, for which nothing is padded."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from nanochat_jax.model import gpt
    from nanochat_jax.model.loss import next_token_loss

    model = config(**{"n_layer": 1, "fused": True, "sequence_len": T + 1, **overrides})
    here = SingleDeviceSharding(devices[0])
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), gpt.abstract(model))
    ids = jax.ShapeDtypeStruct((ROWS, T + 1), "int32", sharding=here)
    return jax.jit(jax.grad(lambda p, ids: next_token_loss(model, p, ids, ids))).lower(params, ids)


def norms(devices, module: str = "fused"):
    """Every norm of a block by itself, forward and backward; inputs and cotangents are arguments."""
    import importlib

    import jax
    from jax.sharding import SingleDeviceSharding

    from nanochat_jax.model.layers import rotary_tables

    of = importlib.import_module(f"nanochat_jax.model.{module}")
    tables = [table[None, :, None] for table in rotary_tables(T + 1, 128, 10000.0)]

    def run(x, x0, factors, q, d_x, d_x0, d_y, d_q):
        _, back = jax.vjp(of.with_norm, x)
        _, back_mixed = jax.vjp(of.mixed_with_norm, x, x0, factors)
        rotated, back_rotary = jax.vjp(lambda q: of.rotary_norm(q, *tables, 1.2), q)
        return of.with_norm(x)[1], rotated, back((d_x, d_y)), back_mixed((d_x, d_x0, d_y)), back_rotary(d_q)

    here = SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((ROWS, T + 1, 512), "bfloat16", sharding=here)
    q = jax.ShapeDtypeStruct((ROWS, T + 1, 4, 128), "bfloat16", sharding=here)
    factor = jax.ShapeDtypeStruct((), "float32", sharding=here)
    return jax.jit(run).lower(x, x, (factor, factor), q, x, x, x, q)


def norms_unfused(devices):
    return norms(devices, "layers")


def decode(devices, n_layer: int = 2, **parts):
    """The recipe of October 2025, or with parts of the other."""
    from nanochat_jax.model.gpt import GPTConfig
    from nanochat_jax.planner import fit_batch

    kind = dict(compute_dtype="bfloat16", attention="cudnn")
    model = GPTConfig(1000, 4096, n_layer, n_head=4, n_kv_head=2, n_embd=512, **kind, **parts)
    return fit_batch.lower_sampling(model, devices[0], SLOTS, 1000)


def decode_deeper(devices):
    return decode(devices, n_layer=4)


def decode_modern(devices):
    return decode(devices, n_layer=4, **MODERN)


def main(gpu: str, gpus: str, dump: str, *names: str) -> None:
    devices = compiler.devices(CARDS[gpu], int(gpus))
    found = {}
    for name in names:
        before = set(Path(dump).iterdir())
        compiled = globals()[name](devices).compile()
        memory = compiled.memory_analysis()
        launches = [f for f in set(Path(dump).glob("*thunk_sequence_after_thunk_passes.txt")) - before]
        found[name] = dict(
            text=compiled.as_text(),
            temporary=memory.temp_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            arguments=memory.argument_size_in_bytes,
            launches=launches[0].read_text().splitlines() if launches else [],
        )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
    main(*sys.argv[1:])
