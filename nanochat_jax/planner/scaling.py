"""What the modern recipe derives from a model: horizon, batch, learning rates and weight decay (reference rules).

Everything is tuned at depth 12 with a batch of 2^19 tokens and carried over to other depths from there. S counts the
parameters of the layers' matrices and of lm_head, D = ratio * S tokens are trained on, D_12 is the D of depth 12:

    batch         2^19 (D / D_12)^0.383, rounded to a power of two (arXiv:2505.13738)
    rates         of embeddings, matrices and scalars times sqrt(batch / 2^19)
    weight decay  times sqrt(batch / 2^19) * D_12 / D, so that an epoch of the average of all updates stays as long,
                  measured in tokens of the run (arXiv:2405.13698)
"""

import dataclasses
import math
from dataclasses import dataclass

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.parameters import num_scaling_params
from nanochat_jax.training.optim import OptimHyper

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19
BATCH_EXPONENT = 0.383


@dataclass(frozen=True)
class Scaling:
    """tokens: D. reference_tokens: D of depth 12. total_batch_size: tokens per optimizer step."""

    tokens: int
    reference_tokens: float
    total_batch_size: int

    @property
    def rates(self) -> float:
        """Factor on the learning rates."""
        return math.sqrt(self.total_batch_size / REFERENCE_BATCH)

    @property
    def weight_decay(self) -> float:
        """Factor on the weight decay of the matrices."""
        return self.rates * (self.reference_tokens / self.tokens)

    def applied(self, hyper: OptimHyper) -> OptimHyper:
        """The hyperparameters as scaled. Smear and backout keep their fixed rate."""
        rates = {
            name: getattr(hyper, name) * self.rates
            for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")
        }
        return dataclasses.replace(hyper, **rates, weight_decay=hyper.weight_decay * self.weight_decay)


def scaling(
    config: GPTConfig, ratio: float, total_batch_size: int | None = None, reference: GPTConfig | None = None
) -> Scaling:
    """The scaling of a model trained on `ratio` tokens per scaling parameter.

    Batch, rates and decay do not depend on the ratio, so that one that is not positive (the horizon comes from
    elsewhere) will do. total_batch_size: given instead of derived. reference: the model of depth 12 (default: with the
    width that the depth gives it, otherwise the same).
    """
    ratio = ratio if ratio > 0 else 1.0
    reference = reference or reference_model(config)
    tokens = max(1, int(ratio * num_scaling_params(config)))
    reference_tokens = ratio * num_scaling_params(reference)
    derived = REFERENCE_BATCH * (tokens / reference_tokens) ** BATCH_EXPONENT
    batch = 2 ** max(0, round(math.log2(derived))) if total_batch_size is None else total_batch_size
    return Scaling(tokens, reference_tokens, batch)


def reference_model(config: GPTConfig) -> GPTConfig:
    """The same model at depth 12."""
    shape = GPTConfig.from_depth(REFERENCE_DEPTH, config.vocab_size, config.sequence_len, "modern")
    sizes = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_kv_head", "n_embd")}
    return dataclasses.replace(config, **sizes)
