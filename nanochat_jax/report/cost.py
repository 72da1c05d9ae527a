"""Time and money: what was counted, what was not, and at which rate."""

import datetime
from dataclasses import dataclass

from nanochat_jax.report.blocks import duration
from nanochat_jax.report.collect import Run

# Dollars per GPU and hour where no --price_per_hour is given (the reference's table), by a part of the device's name.
GPU_RATES = {"H100": 3.00, "A100": 1.79, "V100": 0.55}

NOT_COUNTED = (
    "Counted: optimizer steps (in reinforcement learning with their rollouts), tokenizer training, and evaluations. "
    "Not counted: set-up, downloads, token rows, compilation, samples, checkpoints, steps lost to a kill, pauses."
)


@dataclass(frozen=True)
class Cost:
    """Counted seconds of the whole chain, and dollars with an explanation ("" and None without a rate)."""

    seconds: float
    dollars: float | None
    rate: str


def cost(runs: list[Run], price_per_hour: float | None) -> Cost:
    """Sums the time; money at the given price of the whole machine, else at a known rate of its GPUs."""
    tokenizer = runs[0].tokenizer.get("seconds", 0.0)
    seconds = sum(run.train_seconds + run.eval_seconds for run in runs) + tokenizer
    if price_per_hour is not None:
        return Cost(seconds, price_per_hour * seconds / 3600, f"${price_per_hour:g} an hour, as given")
    dollars, used = 0.0, set()
    for run in runs:
        rate = known_rate(run)
        if rate is None:
            return Cost(seconds, None, "")
        gpus, name = rate
        dollars += GPU_RATES[name] * gpus * (run.train_seconds + run.eval_seconds) / 3600
        used.add(f"{gpus} x {name} at ${GPU_RATES[name]:.2f} an hour each")
    return Cost(seconds, dollars, "assumed rate, " + " and ".join(sorted(used)) + "; give --price_per_hour for yours")


def known_rate(run: Run) -> tuple[int, str] | None:
    """(GPUs, name in GPU_RATES) of the machine a run last trained on, or None."""
    session = run.sessions[-1] if run.sessions else {}
    kind = str(session.get("device_kind", ""))
    name = next((n for n in GPU_RATES if n in kind), None)
    return (int(session.get("devices", 1)), name) if name and session.get("backend") != "cpu" else None


def elapsed(runs: list[Run]) -> str:
    """From the first session to the newest checkpoint, pauses included; "" where it is not known."""
    begins = []
    for run in runs:
        for session in run.sessions:
            try:
                begins.append(datetime.datetime.fromisoformat(session["time"]))
            except (KeyError, ValueError, TypeError):
                continue
    if not begins:
        return ""
    begin = min(b if b.tzinfo else b.replace(tzinfo=datetime.UTC) for b in begins)
    end = max(run.saved for run in runs)
    return duration(max((end - begin).total_seconds(), 0.0))
