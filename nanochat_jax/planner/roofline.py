"""How fast a step can be at best, and how long it takes at a stated utilisation."""

from dataclasses import dataclass
from typing import Any

from nanochat_jax.hardware.gpus import Card
from nanochat_jax.model.gpt import GPTConfig, flops_per_token, num_params


@dataclass(frozen=True)
class Roofline:
    """Seconds of one optimizer step that each resource alone would need on one device, at its peak rate."""

    compute: float
    memory: float | None  # None: not known without the compiled program
    link: float
    kernels: float | None  # every kernel at the slower of its two rates, one after the other

    @property
    def bound(self) -> float:
        """No step of this program is faster: links may work beside kernels, kernels only one after the other."""
        return max(self.kernels if self.kernels is not None else self.compute, self.link)

    @property
    def limited_by(self) -> str:
        if self.link >= self.bound:
            return "links"
        return "FLOPs" if self.memory is None or self.compute >= self.memory else "memory bandwidth"


def of_compiled(facts: dict[str, Any], card: Card) -> Roofline:
    """From the counts of a compiled step (`child.compile_case`)."""
    return Roofline(
        compute=facts["flops"] / card.bf16_flops,
        memory=facts["memory_traffic"] / card.memory_bandwidth,
        link=facts["link_bytes"] / card.link_bandwidth,
        kernels=facts["kernel_seconds"],
    )


def of_formula(config: GPTConfig, tokens: int, gpus: int, card: Card) -> Roofline:
    """Without a compiled step of so many tokens: the formula's FLOPs, of attention the half that a causal kernel
    computes, and every gradient scattered and every parameter gathered once."""
    unseen = 6 * config.n_layer * config.n_embd * config.sequence_len
    flops = (flops_per_token(config) - unseen) * tokens / gpus
    link_bytes = 2 * 4 * num_params(config) * (gpus - 1) / gpus
    return Roofline(flops / card.bf16_flops, None, link_bytes / card.link_bandwidth, None)


def seconds_at(mfu: float, flops_per_step: float, gpus: int, card: Card) -> float:
    """Seconds of a step at a share `mfu` of the peak FLOP/s, by the usual formula (attention counted in full)."""
    return flops_per_step / (mfu * card.bf16_flops * gpus)
