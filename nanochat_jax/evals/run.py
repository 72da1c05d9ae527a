"""Evaluates a trained model and keeps every result with its run: CORE, bits per byte, chat tasks, samples.

python -m scripts.eval --source=sft                           every chat evaluation of the newest sft run
python -m scripts.eval --source=base --tasks="CORE|bpb"       some of them
"""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tasks
from nanochat_jax.evals import results
from nanochat_jax.evals.results import Result
from nanochat_jax.evals.settings import BUILT_IN, EvalSettings
from nanochat_jax.hardware import devices
from nanochat_jax.utils import errors, flags, paths
from nanochat_jax.utils.errors import InputError, StorageError
from nanochat_jax.utils.progress import duration
from tasks import demo_world

if TYPE_CHECKING:
    from nanochat_jax.evals.evaluator import Evaluator


def default_tasks(stage: str, demo: bool) -> tuple[str, ...]:
    """What a run of a stage is evaluated on if nothing else is said."""
    if stage == "base":
        return ("bpb", "samples") if demo else ("CORE", "bpb", "samples")
    return demo_world.EVALS if demo else tasks.CHAT_EVALS


def task_names(text: str) -> list[str]:
    """The names in a --tasks value, separated by | or commas, however they are written. Raises ValueError."""
    known = {name.lower(): name for name in (*BUILT_IN, *tasks.CHAT_EVALS, *demo_world.EVALS, "world/rl")}
    found = []
    for name in filter(None, (part.strip() for part in text.replace(",", "|").split("|"))):
        if name.lower() not in known:
            nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)
            raise InputError(
                f"--tasks: {name!r} cannot be evaluated; did you mean {known[nearest[0]]}? (there are "
                f"{', '.join(known.values())})"
            )
        found.append(known[name.lower()])
    return list(dict.fromkeys(found))


def evaluate_tasks(
    names: Sequence[str], evaluator: "Evaluator", folder: Path, step: int, *, again: bool = False
) -> dict[str, Result]:
    """Evaluates the names one after the other and saves each result in the run's folder as soon as there is one.

    A saved result of the same step and settings is not computed again (unless `again`). All data are opened before
    anything is computed. Where results cannot be saved, that is said first, and each is printed all the same. Returns
    name -> result; raises StorageError at the end if one of them was not saved.
    """
    settings = {name: evaluator.settings_of(name) for name in names}
    saved = {} if again else {n: r for n in names if (r := results.find(folder, step, n, settings[n]))}
    evaluator.prepare([name for name in names if name not in saved])
    keeper = _Keeper(folder, step, evaluator.stage)
    if len(saved) < len(names):
        keeper.check()
    found = {}
    for name in names:
        if name in saved:
            print(f"{name}: {results.shown(saved[name])} (saved {saved[name]['time']})", flush=True)
            found[name] = saved[name]
            continue

        partial = None if again or name != "CORE" else results.load(folder, step).get("CORE")
        partial = partial if partial and "tasks" in partial else None
        found[name] = evaluator.evaluate(name, partial=partial, save=keeper.save)
        print(_line(found[name]), flush=True)  # before the write, which may fail
        keeper.save(found[name])
    print(f"\n{results.table({evaluator.stage: {**results.load(folder, step), **found}})}\n")
    keeper.finish()
    return found


class _Keeper:
    """Saves results in the run's folder, and remembers why it could not."""

    def __init__(self, folder: Path, step: int, stage: str):
        self._run, self._step, self._stage = folder, step, stage
        self._problem: OSError | None = None

    def check(self) -> None:
        """Says so where nothing can be saved."""
        try:
            paths.check_writable(results.folder_of(self._run, self._step))
        except StorageError as error:
            self._problem = error
            print(f"results will be printed only: {error}", flush=True)

    def save(self, result: Result) -> None:
        try:
            results.save(self._run, self._step, {"stage": self._stage, **result})
        except OSError as error:
            if self._problem is None:
                print(f"results are printed only from here on: {errors.in_words(error)}", flush=True)
            self._problem = error

    def finish(self) -> None:
        if self._problem is not None:
            raise StorageError(f"not all results were saved: {errors.in_words(self._problem)}") from self._problem
        print(f"saved in {results.folder_of(self._run, self._step)}")


def _line(result: Result) -> str:
    if result["kind"] == "samples":
        return "\n".join(f"  {item['prompt']} -> {item['completion']!r}" for item in result["items"])
    if "skipped" in result:
        return f"{result['task']}: skipped: {result['skipped']}"
    parts = [f"{result['task']}: {results.shown(result)}", f"{result['n']:,} items, {duration(result['seconds'])}"]
    if passes := result.get("pass_at_k"):
        parts += [f"pass@{k} {value:.4f}" for k, value in passes.items() if len(passes) > 1]
    if judge := result["settings"].get("judge"):
        parts.append(judge)
    if result.get("unfinished"):
        parts.append(f"{100 * result['unfinished']:.1f}% of completions cut off")
    if result.get("cut_prompts"):
        parts.append(f"{result['cut_prompts']} prompts lost their first tokens")
    return " | ".join(parts)


def run(settings: EvalSettings) -> dict[str, Result]:
    """Loads the model that the flags name, evaluates it, prints its table of results and returns what was asked for."""
    names = task_names(settings.tasks)
    # JAX takes a second to import: flags are judged before
    from nanochat_jax.evals.evaluator import Evaluator
    from nanochat_jax.runs import checkpoint

    devices.prepare(settings.device)
    print(f"device: {devices.check(settings.device)}")
    config, params, tokenizer, meta = checkpoint.load_model(settings.run_name or None, settings.source, settings.step)
    stage, step, folder = meta["stage"], meta["step"], checkpoint.run_dir(meta["run"])
    if settings.source not in (None, stage):
        raise InputError(f"--run_name={meta['run']} is a {stage} run, not --source={settings.source}: drop one of them")
    trained_with = meta.get("settings") or {}
    names = names or list(default_tasks(stage, bool(trained_with.get("demo"))))
    print(f"evaluating {meta['run']}, stage {stage}, step {step}: {', '.join(names)}")
    evaluator = Evaluator(config, params, tokenizer, stage, settings, trained_with)
    return evaluate_tasks(names, evaluator, folder, step, again=settings.again)


def main(argv: Sequence[str]) -> int:
    """The command line. Exit status: 0 done, 1 error, 2 bad flags, 3 no GPU, 130 stopped by Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("absl", "jax", "orbax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    settings = flags.parse(EvalSettings, argv, __doc__ or "")

    def action() -> None:
        run(settings)

    stopped = "stopped; finished evaluations are saved, and the same command resumes"
    return errors.exit_status(action, {devices.DeviceError: devices.NO_USABLE_GPU}, stopped)
