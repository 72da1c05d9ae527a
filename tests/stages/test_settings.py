"""The flags of the stages: each declared once, what is recorded of them, --help."""

import dataclasses
import re
from typing import Any

import pytest

from nanochat_jax.evals.settings import EvalSettings
from nanochat_jax.stages import base, mid, rl, sft
from nanochat_jax.stages.main import main as train
from nanochat_jax.training.optim import OptimHyper

STAGES: dict[str, Any] = {"base": base, "mid": mid, "sft": sft, "rl": rl}


def test_every_replaced_flag_leads_to_one_that_exists():
    known = {f.name for module in STAGES.values() for f in dataclasses.fields(module.DEFAULTS)}
    known |= {f.name for f in dataclasses.fields(EvalSettings)}
    replaced = {}
    for module in STAGES.values():
        for field in dataclasses.fields(module.DEFAULTS):
            replaced |= field.metadata["reference"]
    assert len(replaced) == 10
    for old, instead in replaced.items():
        named = re.findall(r"--(\w+)", instead)
        assert named and set(named) <= known, old


@pytest.mark.parametrize("stage", STAGES)
def test_a_flag_is_declared_once_and_the_demo_differs_in_values_alone(stage):
    """No class of a stage's settings declares a flag that one above it has: other defaults are values."""
    module = STAGES[stage]
    classes = type(module.DEFAULTS).__mro__[:-1]
    declared = [name for cls in classes for name in cls.__dict__.get("__annotations__", {})]
    assert len(declared) == len(set(declared))
    assert type(module.DEMO) is type(module.DEFAULTS) and module.DEMO.demo and not module.DEFAULTS.demo


def test_the_optimizers_defaults_are_declared_once():
    for module in STAGES.values():
        hyper = module.DEFAULTS.hyper()
        assert hyper == OptimHyper(init_lr_frac=hyper.init_lr_frac)
    with pytest.raises(ValueError, match="--matrix_lr"):
        dataclasses.replace(base.DEFAULTS, matrix_lr=-1.0).hyper()


@pytest.mark.parametrize("demo", [[], ["--demo"]])
@pytest.mark.parametrize("stage", STAGES)
def test_help_of_a_stage_sets_apart_what_it_does_not_use(stage, demo, capsys):
    with pytest.raises(SystemExit) as stop:
        train([f"--stage={stage}", *demo, "--help"])
    assert stop.value.code == 0
    listed, apart, named = capsys.readouterr().out.partition("not used here")
    settings = STAGES[stage].DEMO if demo else STAGES[stage].DEFAULTS
    assert f"(and on Ctrl-C or SIGTERM) (default {settings.save_every})" in " ".join(listed.split())
    for field in dataclasses.fields(settings):
        unused = stage in field.metadata["unused_by"]
        assert (f"--{field.name}=" in listed) != unused and bool(re.search(rf"--{field.name}\b", named)) == unused
    assert bool(apart) == (stage == "rl")
