"""Learning-rate and weight-decay multipliers and the Muon momentum as pure functions of the step.

Every schedule is a callable of the step index (0 for the first update). Called with a Python number it computes in
float64 and returns a float, which is what logs and plans print; called with a traced or concrete JAX array it computes
in float32 and can live inside a jitted update. It is one piece of arithmetic, so the two cannot drift apart, and
because the step is its only input a resumed run follows the same curve as an uninterrupted one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.utils.errors import InputError

Schedule = Callable[[Any], Any]


def _numeric(step) -> tuple[Any, Any]:
    """The step as a floating number and the namespace (numpy or jax.numpy) to compute with."""
    if isinstance(step, jax.Array):
        return step.astype(jnp.float32), jnp
    return np.float64(step), np


def _result(value) -> Any:
    return value if isinstance(value, jax.Array) else float(value)


def warmup_warmdown(
    num_iterations: int,
    warmup_ratio: float = 0.0,
    warmdown_ratio: float = 0.2,
    final_lr_frac: float = 0.0,
    warmup_steps: int = 0,
) -> Schedule:
    """Linear warm-up, constant, linear warm-down: the multiplier of pretraining (reference behaviour).

    The lengths are round(ratio * num_iterations) with Python's rounding (halves to even); `warmup_steps`, unless it is
    0, is the length of the warm-up instead. The step t gives (t + 1) / warmup during the warm-up, 1 up to and including
    num_iterations - warmdown, then a line that reaches `final_lr_frac` at t = num_iterations, one step after the last
    update. Raises ValueError for ratios outside 0..1, a negative warm-up or fewer than 1 step.
    """
    _check_steps(num_iterations)
    for name, ratio in (("warmup_ratio", warmup_ratio), ("warmdown_ratio", warmdown_ratio)):
        if not 0 <= ratio <= 1:
            raise InputError(f"{name} is a fraction of the run and must lie in 0..1, got {ratio}")
    if warmup_steps < 0:
        raise InputError(f"warmup_steps must be >= 0, got {warmup_steps}")
    warmup = warmup_steps or round(warmup_ratio * num_iterations)
    warmdown = round(warmdown_ratio * num_iterations)

    def multiplier(step):
        t, xp = _numeric(step)
        left = (num_iterations - t) / max(warmdown, 1)
        down = left + (1 - left) * final_lr_frac
        value = xp.where(t <= num_iterations - warmdown, 1.0, down)
        return _result(xp.where(t < warmup, (t + 1) / max(warmup, 1), value))

    return multiplier


def linear_to_zero(num_iterations: int) -> Schedule:
    """1 - step / num_iterations: the multiplier of supervised finetuning and of reinforcement learning."""
    _check_steps(num_iterations)

    def multiplier(step):
        t, _ = _numeric(step)
        return _result(1.0 - t / num_iterations)

    return multiplier


def late_decay(num_iterations: int, fraction: float = 0.2) -> Schedule:
    """Midtraining's multiplier: 1, then over the last `fraction` of the steps linear to 0, where it stays.

    The reference counts progress through the data instead of steps, and lets the line continue below zero when it
    overshoots, which would climb the loss.
    """
    _check_steps(num_iterations)

    def multiplier(step):
        t, xp = _numeric(step)
        # counted back from the end: differences of whole steps are exact in float32, a share of the run is not
        return _result(xp.clip((num_iterations - t) / (fraction * num_iterations), 0.0, 1.0))

    return multiplier


def momentum_warmup(warmup_steps: int = 300, start: float = 0.85, end: float = 0.95) -> Schedule:
    """Muon's momentum: linear from `start` to `end` over `warmup_steps` updates, then `end`; 0 steps: always `end`."""
    if warmup_steps < 0:
        raise InputError(f"momentum warm-up must be >= 0 steps, got {warmup_steps}")

    def momentum(step):
        t, xp = _numeric(step)
        done = xp.minimum(t / warmup_steps, 1.0) if warmup_steps else xp.ones_like(t)
        return _result((1 - done) * start + done * end)

    return momentum


def momentum_warmup_warmdown(
    num_iterations: int,
    warmdown_ratio: float = 0.65,
    warmup_steps: int = 400,
    start: float = 0.85,
    peak: float = 0.97,
    end: float = 0.90,
) -> Schedule:
    """Muon's momentum in pretraining of July 2026: `momentum_warmup` to `peak`, then, over the last
    round(warmdown_ratio * num_iterations) updates, a line that reaches `end` at t = num_iterations.

    The warm-up takes precedence: where a short run makes them overlap, the momentum jumps at its end (reference
    behaviour). Raises ValueError for a ratio outside 0..1, a negative warm-up or fewer than 1 step.
    """
    _check_steps(num_iterations)
    if not 0 <= warmdown_ratio <= 1:
        raise InputError(f"warmdown_ratio is a fraction of the run and must lie in 0..1, got {warmdown_ratio}")
    rising, warmdown = momentum_warmup(warmup_steps, start, peak), round(warmdown_ratio * num_iterations)

    def momentum(step):
        t, xp = _numeric(step)
        done = xp.clip((t - (num_iterations - warmdown)) / max(warmdown, 1), 0.0, None)
        return _result(xp.where(t < warmup_steps, rising(step), peak * (1 - done) + end * done))

    return momentum


def cosine_to_zero(num_iterations: int) -> Schedule:
    """(1 + cos(pi step / num_iterations)) / 2: the multiplier of Muon's weight decay in pretraining of July 2026."""
    _check_steps(num_iterations)

    def multiplier(step):
        t, xp = _numeric(step)
        return _result(0.5 * (1 + xp.cos(xp.pi * t / num_iterations)))

    return multiplier


def _check_steps(num_iterations: int) -> None:
    if num_iterations < 1:
        raise InputError(f"a schedule needs num_iterations >= 1, got {num_iterations}")
