"""How fast a step can be at best, how long it takes at a stated utilisation, and what a whole run costs."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanochat_jax.hardware.gpus import Card
from nanochat_jax.model.gpt import GPTConfig, flops_per_token, num_params
from nanochat_jax.planner.plan import BasePlan, PlanError

# What comes beside pretraining: hours that depend on no model (tokenizer, loading, questions answered word by word) and
# as many tokens of training as midtraining, finetuning and the evaluations are worth. Both follow from the reference's
# two documented runs on 8 H100s: 2.8 h of pretraining in 3.85 h at depth 20, 31.3 h in about 33 h at depth 32.
REST_HOURS, REST_TOKENS = 0.8, 1.05e9
DEEPEST = 64


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


def roofline_of_compiled(facts: dict[str, Any], card: Card) -> Roofline:
    """From the counts of a compiled step (`child.compile_case`)."""
    return Roofline(
        compute=facts["flops"] / card.bf16_flops,
        memory=facts["memory_traffic"] / card.memory_bandwidth,
        link=facts["link_bytes"] / card.link_bandwidth,
        kernels=facts["kernel_seconds"],
    )


def roofline_of_formula(config: GPTConfig, tokens: int, gpus: int, card: Card) -> Roofline:
    """Without a compiled step of so many tokens: the formula's FLOPs, of attention what a causal kernel computes (half
    of a full layer), and every gradient scattered and every parameter gathered once."""
    T = config.sequence_len
    keys = [T if w is None else min(w, T) for w in config.windows]
    unseen = sum(6 * config.n_embd * w * w // T for w in keys)  # the first w queries of a row see w / 2 keys on average
    flops = (flops_per_token(config) - unseen) * tokens / gpus
    link_bytes = 2 * 4 * num_params(config) * (gpus - 1) / gpus
    return Roofline(flops / card.bf16_flops, None, link_bytes / card.link_bandwidth, None)


def seconds_at(mfu: float, flops_per_step: float, gpus: int, card: Card) -> float:
    """Seconds of a step at a share `mfu` of the peak FLOP/s, by the usual formula (attention counted in full)."""
    return flops_per_step / (mfu * card.bf16_flops * gpus)


# ---------------------------------------------------------------------------------------------------------------------
# a whole run


@dataclass(frozen=True)
class Cost:
    """Hours of pretraining and of everything; dollars of everything."""

    base_hours: float
    hours: float
    dollars: float


def cost(plan: BasePlan, card: Card, gpus: int, mfu: float, price: float) -> Cost:
    """At a share `mfu` of the peak and a price in dollars per GPU and hour."""
    base, rest = (
        seconds_at(mfu, plan.flops_per_token * n, gpus, card) / 3600 for n in (plan.total_tokens, REST_TOKENS)
    )
    hours = base + rest + REST_HOURS
    return Cost(base, hours, hours * price * gpus)


def propose_depth(
    plan_of: Callable[[int], BasePlan],
    cost_of: Callable[[BasePlan], Cost],
    fits: Callable[[BasePlan], bool],
    hours: float | None = None,
    dollars: float | None = None,
) -> int:
    """The largest even depth whose whole run stays within the hours or dollars, and fits the card.

    Raises PlanError, naming what the smallest run takes, when there is none.
    """

    def possible(depth: int) -> bool:
        try:
            plan = plan_of(depth)
        except PlanError:  # a depth so small that its tokens are less than one step
            return True
        price = cost_of(plan)
        within = (hours is None or price.hours <= hours) and (dollars is None or price.dollars <= dollars)
        return within and fits(plan)

    depths = range(4, DEEPEST + 1, 2)  # deeper always takes more of everything
    best = bisect.bisect_left(depths, True, key=lambda depth: not possible(depth))
    if not best:
        price = cost_of(plan_of(4))
        raise PlanError(
            f"{f'--hours={hours:g}' if hours is not None else f'--dollars={dollars:g}'} is not enough for any model: "
            f"depth 4 takes {price.hours:.2g} hours and ${price.dollars:.2f}"
        )
    return depths[best - 1]
