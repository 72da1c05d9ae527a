"""The plan of a run: cards, compile targets, cached results, time, money, and the command's output and errors."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest

from nanochat_jax.hardware import gpus
from nanochat_jax.hardware.gpus import CARDS
from nanochat_jax.planner import compile as compiled
from nanochat_jax.planner import cost, main, memory
from nanochat_jax.planner.compile import Case
from nanochat_jax.planner.plan import BasePlan
from tests import children

HOUR = 3600.0
BASE: dict[str, Any] = {"vocab_size": 65536, "devices": 8}


def plan(capsys, *arguments) -> dict:
    assert main.main([*arguments, "--json", "--compile=False"]) == 0
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------------------------
# cards and targets


def test_cards_are_plausible():
    for card in CARDS.values():
        assert 8e9 < card.memory_bytes < 2e11 and 2e11 < card.memory_bandwidth < 1e13
        assert card.link_bandwidth < card.memory_bandwidth and 0 < card.price < 20
        # the peak is about what its cores can do: between 256 and 8192 bf16 operations a core and cycle
        assert 2**8 <= card.bf16_flops / (card.cores * card.clock_ghz * 1e9) <= 2**13, card.name


@pytest.mark.parametrize(
    ("name", "key"),
    [("h100", "h100"), ("H100 SXM", "h100"), ("h100_pcie", "h100-pcie"), ("A100", "a100-80"), ("RTX 4090", "rtx4090"),
     ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA A100-SXM4-40GB", "a100-40")],
)  # fmt: skip
def test_spellings(name, key):
    assert gpus.find(name) is CARDS[key]


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *((card.name, key) for key, card in CARDS.items()),
        ("NVIDIA H100 NVL", "h100"),
        ("NVIDIA A100-SXM-80GB", "a100-80"),
        ("NVIDIA L40S-48Q", "l40s"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx3090"),
        ("NVIDIA GB200", "b200"),
        ("NVIDIA H200 NVL", "h200"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L40G", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX 5000 Ada Generation", None),
        ("NVIDIA H20", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_names_of_drivers(kind, key):
    assert gpus.of_device(kind) is CARDS.get(key)


def test_text_proto_holds_the_limits():
    text = compiled.text_proto(CARDS["h100"])
    assert "core_count: 132" in text and "shared_memory_per_block_optin: 232448" in text
    assert "cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }" in text
    assert text.count("{") == text.count("}") and 'device_description_str: "NVIDIA H100 80GB HBM3"' in text
    assert "feature_extension: NONE" in compiled.text_proto(CARDS["a100-40"])
    assert "active_links" not in compiled.text_proto(CARDS["l40s"])


def test_environment_of_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    env = compiled.environment(CARDS["h100"], 8)
    assert env["JAX_PLATFORMS"] == "cpu" and env["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "1"
    assert "latency_hiding_scheduler" in env["XLA_FLAGS"]  # the flags of a real run
    assert "latency_hiding_scheduler" not in compiled.environment(CARDS["h100"], 1).get("XLA_FLAGS", "")


# ---------------------------------------------------------------------------------------------------------------------
# compiled results: the protocol and its cache, with an invented compiler


CASES = [Case("step", "h100", 8, 2, 64, 32, rows) for rows in (1, 2)]


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Answers without compiling anything; counts what it was asked."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    asked = []

    def answer(cases, env, say):
        asked.append([case.rows for case in cases])
        return [{"bytes": case.rows} for case in cases]

    monkeypatch.setattr(compiled, "_compile", answer)
    monkeypatch.setattr(compiled, "plugin_version", lambda: "jax-cuda12-plugin 0")
    return asked


def test_results_are_cached_until_code_card_or_flags_change(compiler, monkeypatch):
    assert compiled.results(CASES[:1]) == [{"bytes": 1}]
    assert compiled.results(CASES) == [{"bytes": 1}, {"bytes": 2}]
    assert compiler == [[1], [2]]  # only what was missing
    monkeypatch.setattr(compiled, "plugin_version", lambda: None)
    assert compiled.results(CASES) == [{"bytes": 1}, {"bytes": 2}]  # found without the plugin too
    monkeypatch.setattr(compiled, "plugin_version", lambda: "jax-cuda12-plugin 0")
    monkeypatch.setattr(compiled, "code_hash", lambda: "other code")
    compiled.results(CASES)
    monkeypatch.setitem(CARDS, "h100", replace(CARDS["h100"], memory_bytes=1))
    compiled.results(CASES)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    compiled.results(CASES)
    assert compiler[2:] == [[1, 2]] * 3


def test_a_damaged_cache_entry_is_compiled_anew(compiler, tmp_path):
    compiled.results(CASES[:1])
    [entry] = tmp_path.glob("compile_cache/plan/*.json")
    entry.write_text("{")
    assert compiled.results(CASES[:1]) == [{"bytes": 1}] and len(compiler) == 2


def test_without_the_plugin_the_error_says_how_to_get_it(compiler, monkeypatch):
    monkeypatch.setattr(compiled, "plugin_version", lambda: None)
    with pytest.raises(compiled.NoPlugin, match="pip install"):
        compiled.results(CASES)


def test_a_compiler_that_dies_is_an_error_with_its_last_words(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "plugin_version", lambda: "jax-cuda12-plugin 0")
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\ncat >/dev/null\necho '{\"bytes\": 7}'\necho 'no such card' >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(compiled.CompileError, match=r"2 rows a GPU.*exit status 3.*no such card"):
        compiled.results(CASES)


# ---------------------------------------------------------------------------------------------------------------------
# time and money


def test_roofline_of_a_compiled_step():
    facts = {"flops": 989e12, "memory_traffic": 3.35e12 / 2, "link_bytes": 450e9 / 10, "kernel_seconds": 1.25}
    line = cost.roofline_of_compiled(facts, CARDS["h100"])
    assert (line.compute, line.memory, line.link) == pytest.approx((1.0, 0.5, 0.1))
    assert line.bound == 1.25 and line.limited_by == "FLOPs"
    slow = cost.roofline_of_compiled({**facts, "link_bytes": 450e9 * 3}, CARDS["h100"])
    assert slow.bound == pytest.approx(3.0) and slow.limited_by == "links"


def test_roofline_by_formula_is_below_the_time_at_full_utilisation():
    """The usual formula counts attention in full; a bound may count only what a causal kernel computes."""
    p = BasePlan.derive(depth=20, **BASE)
    line = cost.roofline_of_formula(p.config, p.total_batch_size, 8, CARDS["h100"])
    per_step = p.flops_per_token * p.total_batch_size
    assert 0.8 < line.bound / cost.seconds_at(1.0, per_step, 8, CARDS["h100"]) < 1.0
    assert line.memory is None and line.kernels is None and line.limited_by == "FLOPs"


def test_costs_are_those_of_the_references_runs():
    """At the utilisation it reached: 2.8 of 3.85 hours at depth 20, 31.3 of about 33 at depth 32, on 8 H100s."""
    d20 = cost.cost(BasePlan.derive(depth=20, **BASE), CARDS["h100"], 8, 0.491, 3.0)
    assert (d20.base_hours, d20.hours) == pytest.approx((2.8, 3.85), rel=0.02)
    assert d20.dollars == pytest.approx(24 * d20.hours)
    d32 = cost.cost(BasePlan.derive(depth=32, **BASE), CARDS["h100"], 8, 0.509, 3.0)
    assert (d32.base_hours, d32.hours) == pytest.approx((31.3, 33), rel=0.03)


@pytest.mark.parametrize("limit", [{"hours": 4.2}, {"dollars": 100.0}, {"hours": 40.0}, {"dollars": 1000.0}])
def test_the_proposed_depth_is_the_largest_within_the_budget(limit):
    def cost_of(p):
        return cost.cost(p, CARDS["h100"], 8, 0.45, 3.0)

    depth = cost.propose_depth(lambda d: BasePlan.derive(depth=d, **BASE), cost_of, lambda p: True, **limit)
    [(name, most)] = limit.items()
    assert getattr(cost_of(BasePlan.derive(depth=depth, **BASE)), name) <= most
    assert getattr(cost_of(BasePlan.derive(depth=depth + 2, **BASE)), name) > most


def test_a_model_that_does_not_fit_is_not_proposed(capsys):
    assert plan(capsys, "--dollars=1e6", "--gpus=1", "--gpu=rtx3090")["depth"] < 40


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_plan_of_the_reference_speedrun(capsys):
    facts = plan(capsys, "--depth=20")
    assert (facts["parameters"], facts["tokens"], facts["steps"]) == (560988160, 11219763200, 21400)
    assert facts["flops"] == pytest.approx(3.918e19, rel=1e-3)
    assert facts["data"]["shards"] == 240 and facts["gpu"]["name"] == "NVIDIA H100 80GB HBM3"
    assert [s["rows"] for s in facts["sizes"]] == [1, 2, 4, 8, 16, 32]
    assert all(s["rows"] * s["accumulation"] == 32 and not s["compiled"] for s in facts["sizes"])
    needs = [s["bytes"] for s in facts["sizes"]]
    assert needs == sorted(needs)
    assert facts["device_batch_size"] == max(s["rows"] for s in facts["sizes"] if s["fits"])
    assert facts["dollars"] == pytest.approx(facts["time"]["hours"] * 24)
    assert facts["time"]["roofline"]["bound"] < facts["time"]["seconds_per_step"]
    assert "estimate by formula" in facts["memory_note"]


def test_shards_of_the_reference_d32(capsys):
    facts = plan(capsys, "--depth=32")
    assert (facts["data"]["shards"], facts["steps"]) == (800, 71680)
    assert facts["flops"] == pytest.approx(4.539628e20)


def test_text_says_what_is_estimated_and_that_nothing_was_measured(capsys):
    assert main.main(["--compile=False", "--depth=4", "--gpus=2", "--gpu=l40s", "--device_batch_size=16"]) == 0
    text = capsys.readouterr().out
    for words in ("36,700,160", "2 x NVIDIA L40S", "(estimated)", "estimate by formula", "(assumed: --mfu)"):
        assert words in text, words
    assert "not measured" in text.splitlines()[-1]


def test_compiled_numbers_reach_the_output(capsys, compiler, monkeypatch):
    facts: dict[str, Any] = {
        "bytes": 60 * 2**30, "params_bytes": 2 * 2**30, "optimizer_bytes": 2**30, "flops": 2e14, "memory_traffic": 5e11,
        "link_bytes": 4e9, "kernel_seconds": 0.3, "cudnn_attention": [20, 20],
        "collectives": [
            {"kind": "reduce-scatter", "bytes": 10**9, "tensors": 3, "times": 1, "in_loop": False, "link_bytes": 8e8},
            {"kind": "reduce-scatter", "bytes": 10**9, "tensors": 2, "times": 1, "in_loop": False, "link_bytes": 8e8},
        ],
    }  # fmt: skip
    monkeypatch.setattr(compiled, "_compile", lambda cases, env, say: [{**facts} for _ in cases])
    assert main.main(["--depth=20", "--device_batch_size=32", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["memory_note"] == "compiled for this card" and made["sizes"][0]["compiled"]
    assert made["step"]["collectives"] == [
        {"kind": "reduce-scatter", "in_loop": False, "operations": 2, "arrays": 5, "bytes": 2e9, "link_bytes": 1.6e9}
    ]
    evaluation, sampling = made["other_programs"]
    assert evaluation["bytes"] == 61 * 2**30 and sampling["bytes"] == 63 * 2**30 and sampling["fits"]
    assert made["time"]["roofline"]["bound"] == 0.3
    assert main.main(["--depth=20", "--device_batch_size=32"]) == 0
    text = capsys.readouterr().out
    assert "60.0 GiB (compiled): fits" in text and "2 operation(s) on 5 array(s), 2.0 GB" in text
    assert "20 forward and 20 backward" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu=h1000"], "--gpu=h1000"),
        (["--depth=20", "--hours=4"], "--depth"),
        (["--hours=0.1"], "--hours=0.1"),
        (["--dollars=-1"], "--dollars"),
        (["--gpus=0"], "--gpus"),
        (["--gpus=3"], "--total_batch_size=522240 or 528384"),
        (["--gpus=8", "--fsdp=3"], "--gpus=8"),
        (["--gpus=8", "--tensor=5"], "--gpus=8"),
        (["--mfu=45"], "--mfu"),
        (["--device_batch_size=48"], "--device_batch_size=32"),
    ],
)
def test_bad_input_names_flag_and_remedy(capsys, arguments, words):
    assert main.main([*arguments, "--compile=False"]) == 1
    assert words in capsys.readouterr().err


def test_impossible_memory_is_said(capsys):
    facts = plan(capsys, "--depth=40", "--gpu=rtx4090")
    assert facts["device_batch_size"] is None and not any(s["fits"] for s in facts["sizes"])
    assert main.main(["--depth=40", "--gpu=rtx4090", "--compile=False"]) == 0
    assert "nothing fits: try --remat=block" in capsys.readouterr().out


def test_memory_formula_grows_with_everything():
    config = BasePlan.derive(depth=8, **BASE).config
    mesh = memory.Mesh(8)
    base = memory.estimate(config, 8, mesh)
    assert memory.estimate(config, 16, mesh) > base
    assert memory.estimate(config, 8, memory.Mesh(1)) > base
    assert memory.estimate(config, 8, memory.Mesh(8, fsdp=8)) < base
    assert base > memory.estimate(config, 8, mesh, "mlp") > memory.estimate(config, 8, mesh, "block")


def test_script():
    done = children.run([sys.executable, "-m", "scripts.plan", "--help"], capture_output=True, text=True, check=True)
    assert "--hours" in done.stdout and "rtx4090" in done.stdout
