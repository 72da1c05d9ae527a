"""From a command line to a stage: its flags, and how errors end the process."""

import importlib
import logging
from typing import Any

from nanochat_jax.evals.results import STAGES
from nanochat_jax.hardware import devices
from nanochat_jax.runs import checkpoint
from nanochat_jax.training import watchdog
from nanochat_jax.training.shutdown import Interrupted, signals_raise
from nanochat_jax.utils import errors, flags


def main(argv: list[str]) -> int:
    """Runs `--stage=NAME [flags]`. Exit status: 0 done or stopped cleanly, 1 error, 2 bad flags, 3 no GPU, 4 hung,
    130 stopped at once by a second Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("absl", "jax", "orbax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    stage, rest = _take_stage(argv)
    statuses = {devices.DeviceError: devices.NO_USABLE_GPU, watchdog.HungError: watchdog.HUNG}
    return errors.exit_status(lambda: _run(stage, rest), statuses)


def _run(stage: str, argv: list[str]) -> None:
    module: Any = importlib.import_module(f"nanochat_jax.stages.{stage}")  # only now: JAX takes a second to import
    recorded = inherited_settings(argv, getattr(module, "PARENTS", ()))
    recipe = flags.chosen("recipe", argv) or recorded.get("recipe") or "v1"
    demo = flags.is_set("demo", argv)
    defaults = module.defaults(demo, recorded) if recipe == "modern" else module.DEMO if demo else module.DEFAULTS
    description = f"python -m scripts.train --stage={stage}: {module.__doc__}"
    settings = flags.parse(defaults, argv, description, stage=stage)
    try:
        with signals_raise():
            module.run(settings)
    except Interrupted as signal:
        print(f"stopped by {signal} outside of training; nothing to save. The same command resumes from here.")


def inherited_settings(argv: list[str], parents: tuple[str, ...]) -> dict[str, Any]:
    """The recorded flags that decide a stage's defaults: of the run that is resumed, else of the run it starts from;
    none where there is no such run, which is complained about later."""
    name, source = flags.chosen("run_name", argv), flags.chosen("source", argv)
    try:
        if name and checkpoint.steps(checkpoint.run_dir(name)):
            folder = checkpoint.run_dir(name)
        elif parents:
            folder = checkpoint.find_run(source) if source else checkpoint.find_first(parents)
        else:
            return {}
        return checkpoint.load_meta(folder).get("settings", {})
    except checkpoint.CheckpointError:
        return {}


def _take_stage(argv: list[str]) -> tuple[str, list[str]]:
    """The value of --stage and the other arguments. Exits with status 2 on a missing or unknown stage."""
    stage, rest = None, []
    arguments = iter(argv)
    for argument in arguments:
        if argument.startswith("--stage="):
            stage = argument.partition("=")[2]
        elif argument == "--stage":
            stage = next(arguments, "")
        else:
            rest.append(argument)
    if stage is None and any(a in ("-h", "--help") for a in rest):
        stage = "base"
    if stage not in STAGES:
        got = "is missing" if stage is None else f"{stage!r} is not known"
        flags.fail(f"--stage {got}; give one of: {', '.join(f'--stage={s}' for s in STAGES)}")
    return stage, rest
