"""A ladder of depths, trained one after the other, and its curve of bits per byte over FLOPs.

    python -m scripts.miniseries --name=new --depths=2,3,4,5 --recipe=modern --seeds=3 -- --data=text --max_seq_len=512
    python -m scripts.miniseries --name=old --depths=2,3,4,5 --recipe=v1 --seeds=3 -- --data=text --max_seq_len=512
    python -m scripts.miniseries --name=new --against=old

What follows -- are flags of pretraining, the same for every rung. A rung is an ordinary run, new-d3-s42: it resumes,
and one that is complete is not trained again. Small models on a CPU may order recipes differently from large ones.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat_jax.data.build_rows import PACKINGS
from nanochat_jax.model.config import RECIPES
from nanochat_jax.model.parameters import flops_per_token, num_params
from nanochat_jax.planner.plan import PlanError
from nanochat_jax.report import curve, html, markdown
from nanochat_jax.report.blocks import Block, LinePlot, Paragraph, Plots, ReportCard, Section, Series, Table
from nanochat_jax.report.curve import Rung
from nanochat_jax.report.main import in_lines
from nanochat_jax.runs import checkpoint, metrics
from nanochat_jax.stages import base
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils import errors, flags
from nanochat_jax.utils.flags import flag
from nanochat_jax.utils.paths import write_atomic
from nanochat_jax.utils.progress import time_left

FIRST_SEED = 42


@dataclass(frozen=True)
class MiniseriesSettings:
    """Flags of scripts.miniseries."""

    name: str = flag("", "name of the ladder: its folder below the base directory's miniseries/, and its runs'")
    depths: str = flag("", "depths to train, comma-separated; none: only compares what is there")
    recipe: str = flag("v1", "nanochat of October 2025 (v1) or of July 2026 (modern)", choices=RECIPES)
    set: str = flag("", "parts of the modern recipe left out: smear=off,normuon=off")
    seeds: int = flag(1, "models of every depth; several give an interval")
    against: str = flag("", "the ladder to compare with")


def main(argv: list[str]) -> int:
    """The command line. Exit status: 0 done, 1 error, 2 bad flags, 130 stopped."""
    at = argv.index("--") if "--" in argv else len(argv)
    own, training = argv[:at], argv[at + 1 :]
    settings = flags.parse(MiniseriesSettings(), own, f"python -m scripts.miniseries: {__doc__}")
    return errors.exit_status(lambda: run(settings, training))


def run(settings: MiniseriesSettings, training: Sequence[str]) -> None:
    """Trains what is missing, writes the curve and its page, prints both. Raises PlanError, CurveError."""
    # 1. what is wanted
    if not settings.name or "/" in settings.name:
        raise PlanError(f"--name={settings.name}: give the ladder a name, which will be a folder's")
    off = _off(settings.set)
    depths = _depths(settings.depths) if settings.depths else []
    if settings.seeds < 1:
        raise PlanError(f"--seeds={settings.seeds} must be 1 or more")
    baseline = curve.load(settings.against) if settings.against else []  # before hours are spent
    # 2. train
    if depths:
        _train(settings, depths, off, training)
    rungs = curve.load(settings.name)
    # 3. compare, and write it down
    worth = {packing: curve.multiplier(baseline, rungs, packing) for packing in PACKINGS if baseline}
    card = _card(settings, rungs, baseline, worth)
    folder = curve.folder_of(settings.name)
    write_atomic(folder / "report.md", markdown.render(card))
    write_atomic(folder / "report.html", html.render(card))
    print(in_lines([_HEADER, *map(_row, rungs)]))
    for packing, found in worth.items():
        print(f"compute multiplier over {settings.against}, {_ROWS[packing]}: {found} ({found.verdict})")
    print(f"written: {folder / curve.CURVE} and {folder / 'report.html'}")


def _off(given: str) -> str:
    """ "smear=off,normuon=off" -> "normuon,smear". Raises PlanError."""
    parts = set()
    for one in filter(None, (one.strip() for one in given.split(","))):
        part, _, value = one.partition("=")
        if value != "off" or part not in base.PARTS:
            raise PlanError(f"--set={one}: give PART=off, of the parts {', '.join(base.PARTS)}")
        parts.add(part)
    return ",".join(sorted(parts))


def _depths(given: str) -> list[int]:
    names = [one.strip() for one in given.split(",")]
    if not all(name.isdecimal() and int(name) > 0 for name in names):
        raise PlanError(f"--depths={given}: give positive numbers, comma-separated: --depths=2,3,4")
    depths = sorted({int(name) for name in names})
    if len(depths) < 2:
        raise PlanError(f"--depths={given}: a curve needs at least two depths")
    return depths


# ---------------------------------------------------------------------------------------------------------------------
# training


def _train(settings: MiniseriesSettings, depths: Sequence[int], off: str, training: Sequence[str]) -> None:
    """Trains every depth with every seed, the small ones first, and records each in the curve."""
    vocab_size = Tokenizer.load().vocab_size
    todo = []  # (depth, seed, flags, FLOPs), in order
    for depth in depths:
        for seed in range(FIRST_SEED, FIRST_SEED + settings.seeds):
            name = f"{settings.name}-d{depth}-s{seed}"
            own = [f"--recipe={settings.recipe}", f"--depth={depth}", f"--seed={seed}", f"--run_name={name}"]
            own.append("--every_packing=True")
            arguments = [*training, *own, *([f"--off={off}"] if off else [])]
            todo.append((depth, seed, arguments, _planned_flops(settings.recipe, arguments, vocab_size)))
    try:
        known = {(rung.depth, rung.seed): rung for rung in curve.load(settings.name)}
    except curve.CurveError:
        known = {}
    done_flops, seconds = 0.0, 0.0
    for number, (depth, seed, arguments, flops) in enumerate(todo, 1):
        folder = checkpoint.run_dir(f"{settings.name}-d{depth}-s{seed}")
        if (rung := _finished(folder)) is None:
            left = sum(f for *_, f in todo[number - 1 :]) / done_flops * seconds if done_flops else None
            remaining = "" if left is None else f", about {time_left(left)} left"
            print(f"=== rung {number} of {len(todo)}: depth {depth}, seed {seed}{remaining}", flush=True)
            began = time.monotonic()
            _pretrain(arguments)
            done_flops, seconds = done_flops + flops, seconds + time.monotonic() - began
            if (rung := _finished(folder)) is None:
                raise PlanError(f"the run {folder.name} was stopped; the same command goes on with it")
        if (rung.recipe, rung.off) != (settings.recipe, off):
            raise PlanError(
                f"the run {folder.name} is of the recipe {rung.recipe} without {rung.off or 'nothing'}: choose another "
                "--name"
            )
        known[depth, seed] = rung
        curve.save(settings.name, [known[key] for key in sorted(known)])


def _planned_flops(recipe: str, arguments: list[str], vocab_size: int) -> float:
    demo = flags.is_set("demo", arguments)
    defaults = base.defaults(demo, {}) if recipe == "modern" else base.DEMO if demo else base.DEFAULTS
    settings = flags.parse(defaults, arguments, "flags of pretraining, after --", stage="base", echo=False)
    return float(base.plan_of(settings, vocab_size, 1).total_flops)


def _pretrain(arguments: Sequence[str]) -> None:
    """One run in a process of its own, whose memory is given back. Ctrl-C reaches both; SIGTERM is passed on."""
    command = [sys.executable, "-m", "scripts.train", "--stage=base", *arguments]
    with subprocess.Popen(command) as process:
        before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
        try:
            status = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    if status:
        raise PlanError(f"pretraining ended with status {status}; when that is mended, the same command goes on")


def _finished(folder: Path) -> Rung | None:
    """What a complete run cost and reached; None: it is not complete."""
    if not checkpoint.steps(folder):
        return None
    meta = checkpoint.load_meta(folder)
    if meta["step"] < meta["identity"]["num_iterations"]:
        return None
    records = metrics.read(folder / "metrics.jsonl")
    last = {name: value for record in records if record["kind"] == "eval" for name, value in record.items()}
    if any(f"{packing}_bpb" not in last for packing in PACKINGS):
        raise PlanError(f"the run {folder.name} was not trained as a rung (--every_packing): choose another --name")
    settings, config = meta["settings"], checkpoint.config_from_dict(meta["config"])
    tokens = meta["step"] * settings["total_batch_size"]
    return Rung(
        run=folder.name,
        recipe=settings.get("recipe", "v1"),
        off=",".join(sorted(filter(None, settings.get("off", "").split(",")))),
        depth=settings["depth"],
        seed=settings["seed"],
        parameters=num_params(config),
        tokens=tokens,
        flops=float(flops_per_token(config)) * tokens,
        seconds=sum(r["seconds"] for r in records if r["kind"] == "train"),
        bpb={packing: last[f"{packing}_bpb"] for packing in PACKINGS},
    )


# ---------------------------------------------------------------------------------------------------------------------
# the page

_ROWS = {"stream": "text as it streams", "best_fit": "documents from their start"}
_HEADER = (
    "run",
    "recipe",
    "parameters",
    "tokens",
    "FLOPs",
    "seconds",
    *(f"bits per byte, {rows}" for rows in _ROWS.values()),
)


def _row(rung: Rung) -> tuple[str, ...]:
    recipe = rung.recipe + (f" without {rung.off}" if rung.off else "")
    sizes = f"{rung.parameters:,}", f"{rung.tokens:,}", f"{rung.flops:.3g}", f"{rung.seconds:,.0f}"
    return rung.run, recipe, *sizes, *(f"{rung.bpb[packing]:.4f}" for packing in _ROWS)


def _series(name: str, rungs: Sequence[Rung], unit: str, packing: str) -> Series:
    """Means over the seeds of every depth, against log10 of FLOPs or seconds, with their range."""
    depths = sorted({rung.depth for rung in rungs})
    at = [[rung for rung in rungs if rung.depth == depth] for depth in depths]
    x = [float(np.mean([np.log10(max(getattr(r, unit), 1e-9)) for r in rung])) for rung in at]
    y, low, high = ([float(f([r.bpb[packing] for r in rung])) for rung in at] for f in (np.mean, np.min, np.max))
    return Series(name, x, y, "points", low, high)


def _card(
    settings: MiniseriesSettings, rungs: Sequence[Rung], baseline: Sequence[Rung], worth: dict[str, curve.Multiplier]
) -> ReportCard:
    curves = {settings.name: rungs, **({settings.against: baseline} if baseline else {})}
    plots = [
        LinePlot(
            f"bits per byte by {unit}, {rows}",
            [_series(n, r, unit, packing) for n, r in curves.items()],
            f"log10 of {unit}",
        )
        for packing, rows in _ROWS.items()
        for unit in ("flops", "seconds")
    ]
    blocks: list[Block] = []
    if worth:
        found = ", ".join(f"{_ROWS[packing]} {value} ({value.verdict})" for packing, value in worth.items())
        blocks.append(
            Section("Worth", [Paragraph(
                f"Compute multiplier of {settings.name} over {settings.against}: {found}. It is the "
                "FLOPs of the baseline for each of the variant's at equal bits per byte; the interval is Student's t "
                f"over {worth['stream'].seeds} seed(s). Small models may order recipes differently from large ones."
            )])
        )  # fmt: skip
    blocks.append(Section("Curve", [Plots(plots)]))
    blocks.append(Section("Rungs", [Table(_HEADER, [_row(r) for _, some in curves.items() for r in some])]))
    return ReportCard("Miniseries", settings.name, blocks)
