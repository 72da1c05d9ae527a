"""The card's contents, in reading order: the verdict, the summary, each stage, what it took, how to do it again."""

import datetime

from nanochat_jax.evals import results
from nanochat_jax.evals.results import STAGES
from nanochat_jax.report import reproduce
from nanochat_jax.report.blocks import (
    ABSENT,
    Block,
    Code,
    Dots,
    FactTable,
    Paragraph,
    ReportCard,
    Section,
    Table,
    Tiles,
    clean,
    count_of,
    interval,
    number,
)
from nanochat_jax.report.collect import Run, rows_manifest
from nanochat_jax.report.cost import NOT_COUNTED, RunsCost, cost, elapsed
from nanochat_jax.report.stage import stage_section, tokens_seen
from nanochat_jax.report.summary import Row, Value, stage_label, summary
from nanochat_jax.utils.progress import duration
from nanochat_jax.utils.provenance import SourceCode, source, this_machine


def build(runs: list[Run], price_per_hour: float | None = None, left_out: list[str] | None = None) -> ReportCard:
    """The card of a chain of runs (at least one), in the order of their stages."""
    rows, money, code = summary(runs), cost(runs, price_per_hour), source()
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    blocks: list[Block] = [
        Tiles(_tiles(runs, rows, money)),
        *(Paragraph(remark) for remark in remarks(runs, left_out or [])),
        Section("Summary", _summary_blocks(runs, rows)),
    ]
    if core := _core_tasks(runs):
        blocks.append(Section("CORE by task", [core]))
    if runs[0].tokenizer:
        blocks.append(Section("Tokenizer", _tokenizer(runs[0])))
    for i, run in enumerate(runs):
        parent = runs[i - 1] if i and (run.meta.get("parent") or {}).get("run") == runs[i - 1].name else None
        blocks.append(stage_section(run, stage_label(run, runs), parent))
    blocks += [
        Section("Time and cost", _time(runs, money)),
        Section("Machine and versions", [_machine(runs)]),
        Section("Provenance", _provenance(runs, code)),
        Section("Do it again", [Code(reproduce.commands(runs))]),
    ]
    return ReportCard("nanochat_jax report card", f"{' → '.join(run.name for run in runs)} · {now}", blocks)


def summary_table(runs: list[Run], rows: list[Row]) -> Table:
    """Metric by stage; all four stages of the pipeline have their column, also those that were not run."""
    labels = [stage_label(run, runs) for run in runs]
    header = ["Metric", *_with_absent(labels, [run.stage for run in runs], [s.upper() for s in STAGES])]
    table = []
    for row in rows:
        cells = _with_absent([_cell(v) for v in row.values], [r.stage for r in runs], [ABSENT] * len(STAGES))
        table.append([row.metric, *cells])
    return Table(header, table)


def _with_absent(cells: list[str], stages: list[str], absent: list[str]) -> list[str]:
    """Cells in the order of STAGES, with the absent stage's own filler where there is no run of it."""
    out = []
    for stage, filler in zip(STAGES, absent, strict=True):
        out += [cell for cell, s in zip(cells, stages, strict=True) if s == stage] or [filler]
    return out + [cell for cell, s in zip(cells, stages, strict=True) if s not in STAGES]


def remarks(runs: list[Run], left_out: list[str]) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    for run in runs:
        if not run.finished:
            found.append(
                f"{run.name} is not finished: its newest checkpoint is step {run.step:,} of {run.planned_steps:,}."
            )
        if not run.train:
            found.append(f"{run.name} has no metrics.jsonl with training steps: no curves and no times for it.")
        stale = sorted({r["step"] for r in run.newest_results.values() if r["step"] != run.step})
        if stale:
            steps = ", ".join(f"{s:,}" for s in stale)
            found.append(f"{run.name} has evaluations of step {steps}, but its newest checkpoint is step {run.step:,}.")
        tokenizer = run.tokenizer.get("hash")
        if tokenizer and tokenizer != run.meta.get("tokenizer_hash"):
            found.append(f"{run.name}: tokenizer.json in its folder is not the one it was trained with.")
    hashes = {run.code.get("sha256") for run in runs} - {None}
    if len(hashes) > 1:
        found.append(f"These runs were trained by different code ({', '.join(map(_short_code, runs))}).")
    first = runs[0]
    if first.stage != "base" and first.meta.get("parent"):
        found.append(f"{first.name} began from {first.meta['parent'].get('run')}, which is not on this card.")
    if left_out:
        found.append(f"Newer runs that are not on this card: {', '.join(left_out)}. Name those you want with --runs.")
    return found


def _tiles(runs: list[Run], rows: list[Row], money: RunsCost) -> list[tuple[str, str, str]]:
    """The headline: at most ten numbers."""
    newest = runs[-1].meta
    tiles = [("parameters", number(reproduce.parameters(newest)), f"depth {newest['config'].get('n_layer')}")]
    tiles.append(("tokens seen", number(sum(tokens_seen(run) for run in runs)), count_of(len(runs), "stage")))
    by_name = {row.metric: row for row in rows}
    wanted = ["CORE", "bits per byte", "ChatCORE", "GSM8K"]
    others = [r.metric for r in rows if r.accuracy and r.metric not in results.CHAT_BASELINES]
    shown = [w for w in wanted if w in by_name]
    for name in [*shown, *others[: 6 - len(shown)]]:
        row = by_name[name]
        run, value = next((r, v) for r, v in zip(reversed(runs), reversed(row.values), strict=True) if v)
        if name == "bits per byte" and row.values[0]:  # later stages measure it on conversations
            run, value = runs[0], row.values[0]
        tiles.append((f"{name}, {run.stage.upper()}", number(value.value), interval(value.low, value.high)))
    tiles.append(("counted time", duration(money.seconds), "training, evaluations"))
    if money.dollars is not None:
        tiles.append(("cost", f"${money.dollars:,.2f}", "as given" if "given" in money.rate else "assumed rate"))
    return tiles


def _summary_blocks(runs: list[Run], rows: list[Row]) -> list[Block]:
    if not rows:
        return [Paragraph("Nothing has been evaluated yet: `python -m scripts.eval` does it.")]
    blocks: list[Block] = [summary_table(runs, rows)]
    shown = [row for row in rows if row.accuracy]
    if shown:
        lanes = [i for i in range(len(runs)) if any(row.values[i] for row in shown)]
        labels = [stage_label(runs[i], runs) for i in lanes]
        values = [[(v := row.values[i]) and (v.value, v.low, v.high) for i in lanes] for row in shown]
        chance = [row.chance for row in shown]
        blocks.append(Dots("Accuracy by stage", [row.metric for row in shown], labels, values, chance))
    note = ""
    if any(v and v.low is not None for row in rows for v in row.values):
        note = "In brackets: 95 % intervals (bootstrap over items)."
    if any(row.metric.startswith("bits per byte") for row in rows):
        note += (
            " Bits per byte are on each stage's own held-out text (documents for BASE, conversations later), so they "
            "compare along a curve, not across a row."
        )
    if any(row.metric == "ChatCORE" for row in rows):
        note += " ChatCORE is the mean of the six chat tasks' accuracies, each rescaled so that guessing is 0."
    return [*blocks, Paragraph(note.strip(), note=True)] if note else blocks


def _cell(value: Value | None) -> str:
    return ABSENT if value is None else f"{number(value.value)}\n{interval(value.low, value.high)}".strip()


def _core_tasks(runs: list[Run]) -> Table | None:
    """Accuracy, interval and centred accuracy of every CORE task, for every stage that has them."""
    columns = []
    for run in runs:
        for result in run.newest_results.values():
            if result["kind"] == "core" and isinstance(result.get("tasks"), dict):
                columns.append((stage_label(run, runs), result["tasks"]))
    if not columns:
        return None
    header, names = ["Task"], list(dict.fromkeys(n for _, tasks in columns for n in tasks))
    for label, _ in columns:
        header += [f"{label} accuracy", f"{label} centered", "items"]
    rows = []
    for name in names:
        cells = [clean(name)]
        for _, tasks in columns:
            task = tasks.get(name, {})
            limits = task.get("interval") or (None, None)
            cells += [
                f"{number(task.get('accuracy'))}\n{interval(*limits)}".strip(),
                number(task.get("centered")),
                number(task.get("n")),
            ]
        rows.append(cells)
    return Table(header, rows)


def _tokenizer(run: Run) -> list[Block]:
    t = run.tokenizer
    facts = [("vocabulary", f"{t['vocab_size']:,} tokens"), ("hash", t["hash"])]
    if "characters" in t:
        facts.append(("trained on", f"{t['characters']:,} characters in {t.get('documents', 0):,} documents"))
    if "seconds" in t:
        facts.append(("training time", duration(t["seconds"])))
    if t.get("source"):
        facts.append(("text", clean(t["source"])))
    if t.get("warning"):
        facts.append(("warning", clean(t["warning"])))
    blocks: list[Block] = [FactTable(facts)]
    if measures := t.get("compression", {}).get("measures"):
        texts = list(dict.fromkeys(text for by_text in measures.values() for text in by_text))
        rows = []
        for encoding, by_text in measures.items():
            found = [by_text.get(text) for text in texts]
            rows.append([encoding, *(number(m["bytes"] / m["tokens"]) if m and m["tokens"] else ABSENT for m in found)])
        blocks += [
            Table(["Encoding", *texts], rows),
            Paragraph("Bytes per token, more is better (scripts.tok_eval).", note=True),
        ]
    return blocks


def _time(runs: list[Run], money: RunsCost) -> list[Block]:
    rows = []
    if "seconds" in runs[0].tokenizer:
        rows.append(["tokenizer", ABSENT, duration(runs[0].tokenizer["seconds"]), ABSENT])
    rows += [
        [run.name, number(len(run.train)), duration(run.train_seconds), duration(run.eval_seconds)] for run in runs
    ]
    facts = [("total counted", f"{duration(money.seconds)} ({number(money.seconds)} s)")]
    if span := elapsed(runs):
        facts.append(("from the first start to the newest checkpoint", f"{span}, pauses included"))
    if money.dollars is None:
        facts.append(("cost", "not known: give --price_per_hour"))
    else:
        facts.append(("cost", f"${money.dollars:,.2f} ({money.rate})"))
    return [
        Table(["What", "steps", "training", "evaluation"], rows),
        FactTable(facts),
        Paragraph(NOT_COUNTED, note=True),
    ]


def _machine(runs: list[Run]) -> Block:
    """The machines of the last session of every run, one column each; one column if they are all the same."""
    columns = [(run.name, machine_of(run)) for run in runs if run.sessions]
    if not columns:
        return Paragraph(f"The runs did not record where they ran. This report was made on {this_machine()}.")
    if all(facts == columns[0][1] for _, facts in columns):
        return FactTable(list(columns[0][1].items()))
    names = list(dict.fromkeys(n for _, facts in columns for n in facts))
    rows = [[n, *(facts.get(n, ABSENT) for _, facts in columns)] for n in names]
    return Table(["", *(name for name, _ in columns)], rows)


def machine_of(run: Run) -> dict[str, str]:
    """What a run's last session says of its machine."""
    s = run.sessions[-1]
    facts = {}
    if "devices" in s:
        facts["devices"] = f"{s['devices']} x {s.get('device_kind', '?')} ({s.get('backend', '?')})"
        if s.get("processes", 1) > 1:
            facts["devices"] += f", {s['processes']} processes"
    if s.get("cpu"):
        facts["CPU"] = f"{s['cpu']}, {count_of(s['cpu_cores'], 'core')}" if s.get("cpu_cores") else s["cpu"]
    if s.get("memory_bytes"):
        facts["memory"] = f"{s['memory_bytes'] / 2**30:.4g} GiB"
    if s.get("python"):
        facts["Python"] = s["python"]
    facts.update({str(k): str(v) for k, v in (s.get("versions") or {}).items()})
    return {k: clean(v) for k, v in facts.items()}


def _provenance(runs: list[Run], code: SourceCode) -> list[Block]:
    facts = []
    if code.commit:
        facts.append(("commit, now", _commit(code.commit, code.dirty)))
    facts.append(("source (SHA-256), now", code.sha256))
    facts.append(("size", f"{code.files} files, {code.lines:,} lines, about {code.characters // 4:,} tokens"))
    for run in runs:
        facts.append((f"{run.name}: code", _code(run, code)))
        facts.append((f"{run.name}: tokenizer", str(run.meta.get("tokenizer_hash", ABSENT))))
        facts.append((f"{run.name}: checkpoint", f"step {run.step:,}, written {run.saved:%Y-%m-%d %H:%M} UTC"))
        if key := run.meta.get("identity", {}).get("rows"):
            facts.append((f"{run.name}: training rows", f"{key}{_rows(str(key))}"))
    note = "Now: when this report was made. The rest is what the runs recorded, in their newest checkpoints."
    return [FactTable(facts), Paragraph(note, note=True)]


def _code(run: Run, now: SourceCode) -> str:
    """The code that wrote a run's newest checkpoint, and whether it is that of now."""
    recorded = run.code
    if not recorded.get("sha256"):
        return "not recorded"
    same = "as now" if recorded["sha256"] == now.sha256 else "not that of now"
    commit = f", commit {_commit(recorded['commit'], recorded.get('dirty'))}" if recorded.get("commit") else ""
    return clean(f"{recorded['sha256']} ({same}){commit}")


def _commit(commit: str, dirty: object) -> str:
    return commit + (" with uncommitted changes" if dirty else "")


def _short_code(run: Run) -> str:
    return f"{run.name}: {clean(str(run.code.get('sha256', 'not recorded'))[:12])}"


def _rows(key: str) -> str:
    manifest = rows_manifest(key)
    if not manifest:
        return ""
    return f" ({manifest['rows']:,} rows of {manifest['T']:,} tokens)"
