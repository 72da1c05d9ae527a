"""One stage on the card: plan, pace, curves, evaluations, and what the model wrote before and after."""

import os
import statistics

from nanochat_jax.report.blocks import (
    ABSENT,
    Block,
    FactTable,
    LinePlot,
    Plots,
    Quotes,
    Samples,
    Section,
    Series,
    Table,
    clean,
    count_of,
    interval,
    number,
)
from nanochat_jax.report.collect import Run, curve
from nanochat_jax.report.summary import PASS_AT, bpb_label, figure, interval_in, main_keys
from nanochat_jax.utils.progress import duration

TITLES = {"base": "Pretraining", "mid": "Midtraining", "sft": "Supervised finetuning", "rl": "Reinforcement learning"}
# Numbers of a training step that are shown as a fact or have a plot of their own; any other one is plotted by its name.
_PACE = {"seconds", "tok_per_sec", "mfu", "data_wait"}
_FIRST = {"loss": "loss", "lr_multiplier": "learning rate (share of its peak)", "grad_norm": "gradient norm"}
MAX_QUOTES = 4
MAX_TROUBLES = 5


def stage_section(run: Run, label: str, parent: Run | None) -> Section:
    """The chapter of one run; `parent` is the run it began from, where that is on the card too."""
    blocks: list[Block] = [FactTable(_facts(run))]
    if plots := _plots(run):
        blocks.append(Plots(plots))
    if table := _during_training(run):
        blocks.append(Section("Measured during training", [table], level=3))
    if table := _evaluations(run):
        blocks.append(Section("Evaluations", [table], level=3))
    if samples := _samples(run, parent):
        blocks.append(Section("Samples", [samples], level=3))
    if quotes := _transcripts(run):
        blocks.append(Section("Rollouts", quotes, level=3))
    settings = [(k, clean(v)) for k, v in run.meta.get("settings", {}).items()]
    blocks.append(FactTable(settings, fold=f"All settings ({len(settings)})"))
    identity = [(k, clean(v)) for k, v in run.meta.get("identity", {}).items()]
    blocks.append(FactTable(identity, fold=f"Identity: what a continued run must agree with ({len(identity)})"))
    return Section(f"{label}: {TITLES.get(run.stage, run.stage)}", blocks)


def tokens_seen(run: Run) -> int:
    """Tokens of all logged steps (a step's tokens are its rate times its time)."""
    return sum(round(r["tok_per_sec"] * r["seconds"]) for r in run.train if {"tok_per_sec", "seconds"} <= r.keys())


def _facts(run: Run) -> list[tuple[str, str]]:
    config, parent = run.meta.get("config", {}), run.meta.get("parent") or {}
    facts = [("run", run.name)]
    if parent:
        facts.append(("began from", f"{parent.get('run')}, step {number(parent.get('step'))}"))
    shape = [count_of(config[k], name) for k, name in (("n_layer", "layer"), ("n_head", "head")) if k in config]
    shape += [f"width {config['n_embd']:,}"] if "n_embd" in config else []
    shape += [f"context {config['sequence_len']:,}"] if "sequence_len" in config else []
    if shape:
        facts.append(("model", ", ".join(shape)))
    planned = f" of {run.planned_steps:,}" if run.planned_steps else ""
    facts.append(("steps", f"{run.step:,}{planned} in the newest checkpoint, {len(run.train):,} logged"))
    if run.train:
        facts.append(("tokens", number(tokens_seen(run))))
        facts.append(("time in steps", duration(run.train_seconds)))
        facts.append(("loss", _first_to_last(curve(run.train, "loss")[1])))
    if rates := curve(run.train, "tok_per_sec")[1]:
        facts.append(("tokens per second", f"{number(statistics.median(rates))} (median)"))
    if mfu := curve(run.train, "mfu")[1]:
        facts.append(("MFU", f"{number(100 * statistics.median(mfu))} % (median)"))
    if waits := curve(run.train, "data_wait")[1]:
        facts.append(("waiting for data", f"{100 * statistics.fmean(waits):.2f} % of the time"))
    if len(run.sessions) > 1:
        facts.append(("sessions", f"{len(run.sessions)} (continued {count_of(len(run.sessions) - 1, 'time')})"))
    if (run.folder / "profile").is_dir():
        facts.append(("profile", f"`xprof --logdir={run.folder.name}/profile` shows what the traced steps spent"))
    return facts + _troubles(run)


def _troubles(run: Run) -> list[tuple[str, str]]:
    """A line for each kind of trouble the run had."""
    rows = lambda r: f" with {r['rows']} rows a device" if r.get("rows") else ""  # noqa: E731
    waited = lambda r: f" (nothing for {duration(r['seconds'])})" if "seconds" in r else ""  # noqa: E731
    kinds = {
        "skipped steps": [f"{r['step']:,} ({clean(r.get('reason', 'no reason kept'))})" for r in run.skips],
        "out of memory": [f"at step {r['step']:,}{rows(r)}" for r in run.incidents if r.get("what") == "out of memory"],
        "hung steps": [f"{r['step']:,}{waited(r)}" for r in run.incidents if r.get("what") == "hang"],
    }
    return [(name, f"{len(found):,}: {_some(found)}") for name, found in kinds.items() if found]


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:MAX_TROUBLES]) + (f" and {len(texts) - MAX_TROUBLES:,} more" * (len(texts) > MAX_TROUBLES))


def _first_to_last(values: list[float]) -> str:
    """How a noisy number went: mean of the first and of the last few."""
    if not values:
        return ABSENT
    n = max(1, min(10, len(values) // 10))
    return f"{number(statistics.fmean(values[:n]))} → {number(statistics.fmean(values[-n:]))}" + (
        f" (means of {n} steps)" if n > 1 else ""
    )


def _plots(run: Run) -> list[LinePlot]:
    """Loss and held-out numbers first, then the schedule, then whatever else a step logged (reward, entropy, ...)."""
    extra = dict.fromkeys(
        k
        for r in run.train
        for k, v in r.items()
        if k not in {"kind", "step", *_PACE, *_FIRST} and isinstance(v, int | float) and not isinstance(v, bool)
    )
    skips = [float(r["step"]) for r in run.skips]
    plots = [
        LinePlot("loss", [Series("loss", *curve(run.train, "loss"), kind="noisy")], marks=skips, marks_name="skipped")
    ]
    plots += _eval_plots(run)
    if passes := [k for k in extra if PASS_AT.fullmatch(k)]:
        series = [Series(k, *curve(run.train, k), kind="noisy") for k in passes]
        plots.append(LinePlot("pass@k of the rollouts", series))
    plots += [
        LinePlot(k.replace("_", " "), [Series(k, *curve(run.train, k), kind="noisy")]) for k in extra if k not in passes
    ]
    for key in ("lr_multiplier", "grad_norm"):
        kind = "line" if key == "lr_multiplier" else "noisy"
        plots.append(LinePlot(_FIRST[key], [Series(key, *curve(run.train, key), kind=kind)]))
    return [p for p in plots if any(s.x for s in p.series)]


def _eval_plots(run: Run) -> list[LinePlot]:
    keys = main_keys(run)
    groups: dict[str, list[str]] = {}
    for k in keys:
        groups.setdefault("pass@k, held out" if PASS_AT.fullmatch(k) else _eval_label(k), []).append(k)
    plots = []
    for title, members in groups.items():
        series = []
        for k in members:
            x, y = curve(run.evals, k)
            limits = [(low, high) for low, high in (interval_in(r, k) for r in run.evals if k in r) if low is not None]
            low, high = zip(*limits, strict=True) if limits and len(limits) == len(x) else ((), ())
            series.append(Series(k, x, y, kind="points", low=low, high=high))
        if max(len(s.x) for s in series) > 1:
            plots.append(LinePlot(title, series))
    return plots


def _eval_label(key: str) -> str:
    return bpb_label(key) if "bpb" in key else key.replace("_", " ")


def _during_training(run: Run) -> Table | None:
    keys = main_keys(run)
    if not keys:
        return None
    rows = []
    for k in keys:
        steps, values = curve(run.evals, k)
        record = next(r for r in reversed(run.evals) if k in r)
        lowest, highest = min(values), max(values)
        rows.append(
            [
                _eval_label(k),
                f"{number(values[0])}\nstep {int(steps[0]):,}",
                f"{number(values[-1])} {interval(*interval_in(record, k))}".strip() + f"\nstep {int(steps[-1]):,}",
                f"{number(lowest)}\nstep {int(steps[values.index(lowest)]):,}",
                f"{number(highest)}\nstep {int(steps[values.index(highest)]):,}",
            ]
        )
    return Table(["Number", "first", "last", "lowest", "highest"], rows)


def _evaluations(run: Run) -> Table | None:
    rows = []
    for task, result in sorted(run.newest_results.items()):
        if result["kind"] == "samples":
            continue
        if "skipped" in result:
            rows.append([clean(task), f"skipped: {clean(result['skipped'])}", *[ABSENT] * 5])
            continue
        value = figure(result)
        shown = ABSENT if value is None else f"{number(value.value)} {interval(value.low, value.high)}".strip()
        if more := _more(result):
            shown += f"\n{more}"
        seconds = result.get("seconds")
        rows.append(
            [
                clean(task),
                shown,
                number(result.get("n")),
                number(result.get("baseline")),
                number(result.get("centered")),
                number(result["step"]),
                ABSENT if seconds is None else duration(seconds),
            ]
        )
    return Table(["Task", "result", "items", "chance", "centered", "step", "time"], rows) if rows else None


def _more(result: dict) -> str:
    """What a result says beside its figure: pass@k of several samples, completions that were cut off."""
    more, passes = [], result.get("pass_at_k") or {}
    if len(passes) > 1:
        k = max(passes, key=int)
        limits = (result.get("pass_at_k_interval") or {}).get(k) or (None, None)
        more.append(f"pass@{k} {number(passes[k])} {interval(*limits)}".strip())
    if result.get("unfinished"):
        more.append(f"{number(100 * float(result['unfinished']))} % of completions cut off")
    return ", ".join(more)


def _samples(run: Run, parent: Run | None) -> Samples | None:
    """The last samples beside those of the parent if both answered the same prompts, else beside the run's first."""
    if not run.samples:
        return None
    last = run.samples[-1]
    after = [clean(t) for t in last.get("texts", [])]
    first = run.samples[0]
    candidates = []
    if first["step"] == 0 and len(run.samples) > 1:
        candidates.append((f"before ({run.name}, step 0)", first))
    if parent and parent.samples:
        candidates.append((f"before ({parent.name}, step {parent.samples[-1]['step']:,})", parent.samples[-1]))
    if len(run.samples) > 1:
        candidates.append((f"early ({run.name}, step {first['step']:,})", first))
    label = f"after ({run.name}, step {last['step']:,})"
    for before_label, record in candidates:
        before = [clean(t) for t in record.get("texts", [])]
        if len(before) == len(after) and all(map(_same_prompt, before, after)):
            return Samples(before_label, label, list(zip(before, after, strict=True)))
    return Samples("", label, [("", text) for text in after])


def _same_prompt(a: str, b: str) -> bool:
    """Whether two samples plausibly continue one prompt: they begin alike."""
    return len(os.path.commonprefix([a, b])) >= min(6, len(a), len(b))


def _transcripts(run: Run) -> list[Block]:
    """A few rollouts of the first and of the last step that kept any, and samples made by scripts.eval."""
    blocks: list[Block] = []
    kept = run.transcripts[:1] + run.transcripts[1:][-1:]
    for record in kept:
        quotes = [_quote(s) for s in record.get("samples", [])[:MAX_QUOTES]]
        blocks.append(Quotes(quotes, fold=f"Step {record['step']:,}: {count_of(len(quotes), 'rollout')}"))
    for task, result in sorted(run.newest_results.items()):
        if result["kind"] == "samples" and result.get("items"):
            quotes = [_quote(item) for item in result["items"][: 2 * MAX_QUOTES]]
            blocks.append(Quotes(quotes, fold=f"{clean(task)}, step {result['step']:,}"))
    return blocks


def _quote(sample: object) -> tuple[str, str]:
    """(title, text): numbers of a rollout become its title, its texts follow."""
    if not isinstance(sample, dict):
        return "", clean(sample)
    short, texts = [], []
    for key, value in sample.items():
        if isinstance(value, str) and key not in ("id", "task"):
            texts.append(clean(value))
        else:
            short.append(f"{key} {number(value) if isinstance(value, int | float) else clean(value)}")
    return ", ".join(short), "\n".join(texts)
