"""Memory of a training step by formula, for where it cannot be compiled (no CUDA plugin), and as a first guess.

The terms are those of the program; their sizes are fitted to steps compiled for H100s (by
`benchmarks/calibrate_memory.py`, which prints new ones when the step has changed). They cannot be had by counting
tensors: of a model's activations XLA keeps some, computes some again and fuses others away.
"""

import math
from dataclasses import dataclass

import jax

from nanochat_jax.model.gpt import GPTConfig, num_params
from nanochat_jax.parallel import sharding
from nanochat_jax.training import optim

CHUNK = 1 << 27  # entries of a chunk of logits, as loss.chunk_size has it on GPUs

# Size of every term, see `terms`, and the largest relative error of the total over compiled steps (5 % over those
# fitted to; near the card's limit XLA recomputes more than the formula knows).
FIT = {"none": 20.57, "mlp": 12.45, "block": 2.25, "gradients": 1.52, "logits": 2.22}
ERROR = 0.1


@dataclass(frozen=True)
class Mesh:
    """Numbers of devices, as of `sharding.make_mesh`: all of them, and those along fsdp and along tensor."""

    devices: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def rows(self) -> int:
        """Into how many shards a batch is divided."""
        return self.devices // self.tensor


def state_bytes(config: GPTConfig, mesh: Mesh) -> int:
    """Bytes of float32 parameters and optimizer state on each device; stacks of matrices are padded to the devices."""
    stacks = optim.stack_members(config).values()
    momentum = sum(math.ceil(len(alike) / mesh.devices) * math.prod(alike[0].shape) for alike in stacks)
    moments = 0.0
    for leaf in jax.tree.leaves(optim.adamw_members(config)):
        sharded = sharding.dimension(leaf.kind, sharding.FSDP) is not None
        moments += 2 * math.prod(leaf.shape) / (mesh.devices if sharded else 1)
    return int(4 * (num_params(config) / (mesh.fsdp * mesh.tensor) + moments + momentum))


def terms(config: GPTConfig, rows: int, mesh: Mesh, remat: str) -> dict[str, float]:
    """Bytes per unit of each constant of FIT: what the temporaries of a step of `rows` rows a device are made of.

    The name of `remat` itself: tokens x layers x width, kept for the backward pass.
    gradients: a float32 tree of them. logits: one float32 chunk.
    """
    tokens, width = rows * config.sequence_len, config.n_embd
    return {
        remat: float(tokens * width * config.n_layer),
        "gradients": 4.0 * num_params(config) / mesh.tensor,
        "logits": 4.0 * min(tokens * config.vocab_size, CHUNK) / mesh.tensor,
    }


def estimate(config: GPTConfig, rows: int, mesh: Mesh | None = None, remat: str = "none") -> int:
    """Bytes per device of a training step: state and temporaries. With `tensor` above 1 it errs upwards: activations
    are partly sharded too."""
    mesh = mesh or Mesh()
    sizes = terms(config, rows, mesh, remat)
    return state_bytes(config, mesh) + int(sum(FIT[name] * size for name, size in sizes.items()))
