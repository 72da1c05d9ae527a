"""The speedrun script: it parses, and --plan_only shows every command of every preset without running any."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests import children, speedrun_environment

SCRIPT = Path(__file__).resolve().parent.parent / "speedrun_jax.sh"


@pytest.fixture
def speedrun(tmp_path):
    """Runs the script with --plan_only; its Python is the tests' own, so the plan itself can be made."""
    venv = speedrun_environment.make(tmp_path / "venv")

    def run(preset, *arguments, plan_only=True, **variables):
        env = {k: v for k, v in os.environ.items() if k not in ("WANDB_RUN", "MAX_PROBLEMS", "PRICE_PER_HOUR", "GPU")}
        env |= {
            "PRESET": preset,
            "VENV": str(venv),
            "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
            **variables,
        }
        return children.run(
            ["bash", str(SCRIPT), *(["--plan_only"] if plan_only else []), *arguments],
            env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


def commands(output: str) -> list[str]:
    """What would run, in order: the module and its flags."""
    return re.findall(r"^  \S+/python -m (.*)$", output, re.MULTILINE)


def test_demo_commands(speedrun, tmp_path):
    done = speedrun("demo")
    assert done.returncode == 0, done.stderr
    assert commands(done.stdout) == [
        "scripts.tok_train --demo --vocab_size=1024",
        "scripts.train --stage=base --demo --run_name=demo-base --device=cpu",
        "scripts.train --stage=mid --demo --source=demo-base --run_name=demo-mid --device=cpu",
        "scripts.train --stage=sft --demo --source=demo-mid --run_name=demo-sft --device=cpu",
        "scripts.train --stage=rl --demo --source=demo-sft --run_name=demo-rl --device=cpu",
        "scripts.eval --source=mid --run_name=demo-mid --device=cpu",
        "scripts.eval --source=sft --run_name=demo-sft --device=cpu",
        "scripts.eval --source=rl --run_name=demo-rl --device=cpu",
        "scripts.report --runs=demo-base,demo-mid,demo-sft,demo-rl",
    ]
    assert not (tmp_path / "base").exists()  # nothing ran


@pytest.mark.parametrize(
    ("name", "preset", "depth", "first", "chars"),
    [("v1-d20", "v1-d20", 20, 8, "2000000000"), ("d32", "d32", 32, 16, "4000000000")],
)
def test_gpu_presets_of_v1_have_the_references_sizes(speedrun, name, preset, depth, first, chars):
    done = speedrun(name)
    assert done.returncode == 0, done.stderr
    base = f"--depth={depth} --target_param_data_ratio=20 --total_batch_size=524288 --run_name={preset}-base"
    assert commands(done.stdout) == [
        f"scripts.plan --depth={depth} --gpu=h100 --gpus=8",
        f"nanochat_jax.data.hub -n {first}",
        f"scripts.tok_train --max_chars={chars} --vocab_size=65536",
        "scripts.tok_eval",
        f"scripts.train --stage=base {base}",
        f"scripts.eval --source=base --run_name={preset}-base",
        f"scripts.train --stage=mid --source={preset}-base --run_name={preset}-mid",
        f"scripts.eval --source=mid --run_name={preset}-mid",
        f"scripts.train --stage=sft --source={preset}-mid --run_name={preset}-sft",
        f"scripts.eval --source=sft --run_name={preset}-sft",
        f"scripts.train --stage=rl --source={preset}-sft --run_name={preset}-rl",
        f"scripts.eval --source=rl --run_name={preset}-rl --tasks=GSM8K",
        f"scripts.report --runs={preset}-base,{preset}-mid,{preset}-sft,{preset}-rl",
    ]
    assert {20: "560,988,160", 32: "1,879,048,192"}[depth] in done.stdout  # the plan's parameters
    assert {20: "240 shards", 32: "800 shards"}[depth] in done.stdout  # what the plan says of the text


def test_the_gpu_preset_is_the_references_current_recipe(speedrun):
    done = speedrun("gpu")
    assert done.returncode == 0, done.stderr
    size = "--recipe=modern --depth=24 --target_param_data_ratio=8 --total_batch_size=1048576"
    assert commands(done.stdout) == [
        f"scripts.plan {size} --gpu=h100 --gpus=8",
        "nanochat_jax.data.hub -n 8 --repo=climbmix",
        "scripts.tok_train --recipe=modern",
        "scripts.tok_eval",
        f"scripts.train --stage=base {size} --run_name=d24-base",
        "scripts.eval --source=base --run_name=d24-base",
        "scripts.train --stage=sft --source=d24-base --run_name=d24-sft",
        "scripts.eval --source=sft --run_name=d24-sft",
        "scripts.train --stage=rl --source=d24-sft --run_name=d24-rl",
        "scripts.eval --source=rl --run_name=d24-rl --tasks=GSM8K",
        "scripts.report --runs=d24-base,d24-sft,d24-rl",
    ]
    assert "1,384,122,122" in done.stdout and "5,568" in done.stdout  # parameters and steps


def test_any_depth_is_a_preset(speedrun):
    modern, v1 = (commands(speedrun(preset).stdout) for preset in ("modern-d12", "v1-d12"))
    base = "scripts.train --stage=base"
    assert f"{base} --recipe=modern --depth=12 --run_name=modern-d12-base" in modern
    assert f"{base} --depth=12 --target_param_data_ratio=20 --total_batch_size=524288 --run_name=v1-d12-base" in v1


@pytest.fixture
def node(tmp_path):
    """The environment of a machine with so many cards, as nvidia-smi shows them."""

    def of(card, number):
        smi = tmp_path / "bin" / "nvidia-smi"
        smi.parent.mkdir(exist_ok=True)
        lines = "\n".join(f"GPU {i}: {card} (UUID: GPU-{i})" for i in range(number))
        smi.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
        smi.chmod(0o755)
        return {"PATH": f"{smi.parent}:{os.environ['PATH']}"}

    return of


def test_a_node_that_is_fast_enough_trains_d24(speedrun, node):
    done = speedrun("", **node("NVIDIA H100 80GB HBM3", 8))
    assert re.search(r"8 x NVIDIA H100 80GB HBM3: about [\d.]+ hours, \d+ dollars", done.stdout), done.stderr
    assert "Preset: d24" in done.stdout and "--run_name=d24-base" in done.stdout


def test_a_run_of_days_is_not_started_unasked(speedrun, node):
    """It says hours and dollars, chooses a depth that fits, and waits for PRESET where nobody can be asked."""
    card = node("NVIDIA GeForce RTX 4090", 1)
    done = speedrun("", plan_only=False, **card)
    hours = [float(h) for h in re.findall(r"about ([\d.]+) hours", done.stdout)]
    assert done.returncode == 1 and len(hours) == 2 and hours[0] > 24 >= hours[1], done.stdout + done.stderr
    assert re.search(r"PRESET=modern-d\d+ ", done.stderr) and "===" not in done.stdout
    unknown = speedrun("", **node("NVIDIA RTX A1000", 1))
    assert unknown.returncode == 1 and "A1000" in unknown.stderr and "PRESET=" in unknown.stderr


def test_flags_pass_through(speedrun):
    done = speedrun(
        "demo", "--num_iterations=4", "--sft.num_epochs=2", "--rl.slots=8", "--run_name=a b", "--model-name", "Ada",
        WANDB_RUN="mine", MAX_PROBLEMS="7", PRICE_PER_HOUR="24",
    )  # fmt: skip
    lines = {re.sub(r"^scripts\.", "", c).split(" --run_name")[0]: c for c in commands(done.stdout)}
    training = [c for c in commands(done.stdout) if c.startswith("scripts.train")]
    assert len(training) == 4 and all("--num_iterations=4" in c and "--sinks=wandb" in c for c in training)
    assert all(r"--run_name=a\ b" in c for c in training)
    assert ["Ada" in c for c in training] == [False, True, True, True]  # the stages that learn the name
    assert [("--num_epochs=2" in c, "--slots=8" in c) for c in training] == [
        (False, False), (False, False), (True, False), (False, True),
    ]  # fmt: skip
    assert "--source=mine-sft --run_name=mine-rl" in training[3]
    evaluations = [c for c in lines.values() if c.startswith("scripts.eval")]
    assert evaluations and all("--max_problems=7 --max_per_task=7" in c for c in evaluations)
    assert "--price_per_hour=24" in commands(done.stdout)[-1]


def test_gpus_that_nvidia_smi_does_not_show_are_not_passed_over(speedrun, tmp_path):
    (tmp_path / "cards" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "nvidia-smi"
    broken.write_text("#!/bin/sh\nexit 9\n")
    broken.chmod(0o755)
    env = {"NVIDIA_CARDS": str(tmp_path / "cards"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = speedrun("", **env)
    assert done.returncode == 1 and "nvidia-smi" in done.stderr and "PRESET=demo" in done.stderr
    assert speedrun("demo", **env).returncode == 0
    done = speedrun("d99")
    assert done.returncode == 1 and "d99" in done.stderr


def test_a_step_says_how_long_it_took_and_a_failure_ends_the_run(tmp_path):
    """The script's own `step`, cut out of it."""
    text = SCRIPT.read_text(encoding="utf-8")
    functions = "\n".join(re.search(rf"^{name}\(\) \{{.*?^\}}", text, re.M | re.S)[0] for name in ("show", "step"))  # pyright: ignore[reportOptionalSubscript]
    run = f"set -euo pipefail\nplan_only= running= stopped=\n{functions}\n"
    run += "step 'a nap' sleep 0.1\nstep wrong false\necho not reached"
    done = children.run(["bash", "-c", run], capture_output=True, text=True, timeout=60)
    assert re.search(r"=== a nap: 0 min 0[01] s", done.stdout)
    assert done.returncode == 1 and "not reached" not in done.stdout
