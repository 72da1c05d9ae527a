"""Time and money: what was counted, what was not, and at which rate."""

import datetime
from dataclasses import dataclass

from nanochat_jax.hardware import gpus as cards
from nanochat_jax.report.collect import Run
from nanochat_jax.utils.progress import duration

NOT_COUNTED = (
    "Counted: optimizer steps (in reinforcement learning with their rollouts), tokenizer training, and evaluations. "
    "Not counted: set-up, downloads, token rows, compilation, samples, checkpoints, steps lost to a kill, pauses."
)


@dataclass(frozen=True)
class RunsCost:
    """Counted seconds of the whole chain, and dollars with an explanation ("" and None without a rate)."""

    seconds: float
    dollars: float | None
    rate: str


def cost(runs: list[Run], price_per_hour: float | None) -> RunsCost:
    """Sums the time; money at the given price of the whole machine, else at what its cards usually cost."""
    tokenizer = runs[0].tokenizer.get("seconds", 0.0)
    seconds = sum(run.train_seconds + run.eval_seconds for run in runs) + tokenizer
    if price_per_hour is not None:
        return RunsCost(seconds, price_per_hour * seconds / 3600, f"${price_per_hour:g} an hour, as given")
    dollars, used = 0.0, set()
    for run in runs:
        rate = known_rate(run)
        if rate is None:
            return RunsCost(seconds, None, "")
        gpus, card = rate
        dollars += card.price * gpus * (run.train_seconds + run.eval_seconds) / 3600
        used.add(f"{gpus} x {card.name} at ${card.price:.2f} an hour each")
    return RunsCost(
        seconds, dollars, "assumed rate, " + " and ".join(sorted(used)) + "; give --price_per_hour for yours"
    )


def known_rate(run: Run) -> tuple[int, cards.Card] | None:
    """(GPUs, their card with its price) of the machine a run last trained on, or None."""
    session = run.sessions[-1] if run.sessions else {}
    card = cards.of_device(str(session.get("device_kind", "")))
    return (int(session.get("devices", 1)), card) if card and session.get("backend") != "cpu" else None


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
