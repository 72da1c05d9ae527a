"""Memory of a training step by formula, for where it cannot be compiled (no CUDA plugin), and as a first guess.

The terms are those of the program; their sizes are fitted to steps compiled for H100s (by
`benchmarks/calibrate_memory.py`, which prints new ones when the step has changed). They cannot be had by counting
tensors: of a model's activations XLA keeps some, computes some again and fuses others away.
"""

import math
from dataclasses import dataclass

from nanochat_jax.model.gpt import GPTConfig, num_params

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
    n, embeddings = num_params(config), 2 * config.vocab_size * config.n_embd
    square = config.n_embd * config.n_embd
    padded = sum(math.ceil(k * config.n_layer / mesh.devices) * size * square for k, size in ((4, 1), (1, 4), (1, 4)))
    return int(4 * (n / (mesh.fsdp * mesh.tensor) + 2 * embeddings / mesh.devices + padded))


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
