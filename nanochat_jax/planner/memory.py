"""Memory of a training step by formula, for where it cannot be compiled (no CUDA plugin), and as a first guess.

The parts are those of the program; their sizes were fitted to steps compiled for H100s and reproduce them to within
ERROR. What XLA makes of a model's activations is not a matter of counting tensors: it keeps some, recomputes some
and fuses others away.
"""

from dataclasses import dataclass

from nanochat_jax.gpt import GPTConfig, num_params

ERROR = 0.15  # largest relative error against compiled steps, see tests/test_planner_memory.py

# Bytes per token, layer and unit of width that are kept for the backward pass, by what is recomputed.
ACTIVATIONS = {"none": 36.5, "mlp": 20.3, "block": 2.1}
STREAM = 25.0  # bytes per token and unit of width outside the layers, and of the one layer at work
LOGITS = 1.5  # chunks of float32 logits alive at once
CHUNK = 1 << 27  # entries of a chunk of logits (loss.chunk_size)


@dataclass(frozen=True)
class Mesh:
    """Numbers of devices, as of `sharding.make_mesh`: all of them, and those along fsdp and along tensor."""

    devices: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def rows(self) -> int:
        """Into how many parts a batch is cut."""
        return self.devices // self.tensor


def state_bytes(config: GPTConfig, mesh: Mesh) -> int:
    """Bytes of float32 parameters and optimizer state on each device."""
    n, embeddings = num_params(config), 2 * config.vocab_size * config.n_embd
    moments = (2 * embeddings + (n - embeddings)) / mesh.devices
    return int(4 * (n / (mesh.fsdp * mesh.tensor) + moments))


def estimate(config: GPTConfig, rows: int, accumulation: int, mesh: Mesh | None = None, remat: str = "none") -> int:
    """Bytes per device of a step of `rows` rows a device: state, gradients, activations, logits."""
    mesh = mesh or Mesh()
    tokens, width = rows * config.sequence_len, config.n_embd
    gradients = 4 * num_params(config) / mesh.tensor * (2 if accumulation > 1 else 1)
    activations = tokens * width * (ACTIVATIONS[remat] * config.n_layer + STREAM)
    logits = LOGITS * 4 * min(tokens * config.vocab_size, CHUNK) / mesh.tensor
    return int(state_bytes(config, mesh) + gradients + activations + logits)
