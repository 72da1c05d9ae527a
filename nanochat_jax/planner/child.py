"""The process that compiles for a card: `python -m nanochat_jax.planner.child`, in the environment of `compile`.

Reads a JSON list of cases on stdin and answers each with a line of JSON, as soon as it is done. A process of its own,
because the flags for a GPU must be set before JAX starts, and because a compiler may end its process.
"""

import json
import math
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import jax

from nanochat_jax.hardware import gpus as cards
from nanochat_jax.model import fused
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.parallel import sharding
from nanochat_jax.planner import compile as compiler
from nanochat_jax.planner import fit_batch, hlo
from nanochat_jax.planner.compile import Case
from nanochat_jax.training.optim import GRAD_CLIP, OptimHyper, make_optimizer
from nanochat_jax.training.step import abstract_state, make_train_step


def config_of(case: Case) -> GPTConfig:
    """The model as a GPU trains it: bfloat16 or float8 matmuls, cuDNN attention, fused norms."""
    in_float8 = case.fp8 and case.program == "step"
    run: dict[str, Any] = dict(compute_dtype="float8" if in_float8 else "bfloat16", attention="cudnn", remat=case.remat)
    config = GPTConfig.from_depth(
        case.depth, case.vocab_size, case.T, "modern" if case.recipe == "modern" else "v1", **run
    )
    return replace(config, fused=case.program == "step" and not fused.refusal(config))


def compile_case(case: Case) -> dict[str, Any]:
    """Compiles one case and returns its numbers, all of one device: bytes, FLOPs, seconds; JSON-able."""
    card, config, began = cards.CARDS[case.gpu], config_of(case), time.perf_counter()
    devices = compiler.devices(card, case.gpus)
    mesh = sharding.make_mesh(devices, case.fsdp, case.tensor)
    facts: dict[str, Any] = {}
    if case.program == "step":
        optimizer = make_optimizer(OptimHyper.of(case.recipe, ns_dtype="bfloat16"), 10_000, config.n_embd)
        step = make_train_step(config, optimizer, mesh, GRAD_CLIP[case.recipe], guarded=True)  # as it is trained
        lowered = fit_batch.lower_step(step, config, optimizer, mesh, case.rows, case.accumulation, case.T)
        state = abstract_state(config, optimizer, mesh)
        facts["params_bytes"] = _local_bytes(state.params)
        facts["optimizer_bytes"] = _local_bytes(state.opt_state)
    elif case.program == "evaluation":
        lowered = fit_batch.lower_evaluation(config, mesh, case.rows, case.T)
    else:
        lowered = fit_batch.lower_sampling(config, devices[0], case.rows, case.T)
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    counts = hlo.count(text)
    return {
        **facts,
        "bytes": fit_batch.bytes_needed(memory),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
        "collectives": [asdict(c) | {"link_bytes": c.link_bytes} for c in counts.collectives],
        "link_bytes": counts.link_bytes,
        "flops": counts.flops,
        "memory_traffic": counts.bytes,
        "other_traffic": counts.other_bytes,
        "kernels": sum(k.times for k in counts.kernels),
        "kernel_seconds": counts.kernel_seconds(card.bf16_flops, card.memory_bandwidth),
        "expected_seconds": _expected_seconds(counts, card),
        "unknown_loops": counts.unknown_loops,
        "float8_products": text.count('custom_call_target="__cublas$lt$matmul$f8"'),
        "cudnn_attention": [counts.attention_forward, counts.attention_backward],
        "compile_seconds": time.perf_counter() - began,
    }


def _expected_seconds(counts: hlo.Counts, card: cards.Card) -> float:
    """Of a step: kernels at the rates that they usually reach, and the reduce-scatters, which nothing can hide."""
    scattered = sum(c.link_bytes * c.times for c in counts.collectives if c.kind == "reduce-scatter")
    kernels = counts.kernel_seconds(card.bf16_flops, card.memory_bandwidth, hlo.REACHED)
    return kernels + scattered / card.link_bandwidth


def _local_bytes(tree) -> int:
    """Bytes of one device's part of a tree of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def main() -> None:
    for given in json.load(sys.stdin):
        print(json.dumps(compile_case(Case(**given))), flush=True)


if __name__ == "__main__":
    main()
