"""The derived numbers of the modern recipe against the reference's: the table of its specification, exactly."""

import dataclasses
import json
from typing import Any

import pytest

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.parameters import MATRICES, flops_per_token, num_params, num_params_by_group, num_scaling_params
from nanochat_jax.planner import scaling
from nanochat_jax.planner.plan import AUTO, BasePlan, PlanError
from nanochat_jax.training.optim import OptimHyper, adamw_settings, initial_learning_rates

# depth: scaling parameters, parameters, FLOPs per token, target tokens, batch, steps, factor on rates, weight decay
TABLE = {
    4: (11_534_384, 36_700_242, 8.022e7, 138_412_608, 2**18, 528, 0.7071, 1.8899),
    8: (41_943_232, 125_829_354, 2.957e8, 503_318_784, 2**18, 1_920, 0.7071, 0.51972),
    12: (110_100_912, 286_261_730, 7.597e8, 1_321_210_944, 2**19, 2_520, 1, 0.28),
    16: (234_881_792, 536_871_738, 1.585e9, 2_818_581_504, 2**19, 5_376, 1, 0.13125),
    20: (435_160_240, 896_533_746, 2.886e9, 5_221_922_880, 2**20, 4_980, 1.4142, 0.10019),
    24: (729_810_624, 1_384_122_122, 4.775e9, 8_757_727_488, 2**20, 8_352, 1.4142, 0.05974),
    26: (918_423_532, 1_681_786_938, 5.991e9, 11_021_082_384, 2**20, 10_510, 1.4142, 0.04747),
    32: (1_677_724_672, 2_818_575_450, 1.077e10, 20_132_696_064, 2**21, 9_600, 2, 0.03675),
}
HYPER = OptimHyper.of("modern")


def plan(depth: int, **change: Any) -> BasePlan:
    flags: dict[str, Any] = dict(vocab_size=32768, total_batch_size=AUTO, target_param_data_ratio=12.0, hyper=HYPER)
    return BasePlan.derive(depth=depth, **{**flags, "device_batch_size": 1, **change})


@pytest.mark.parametrize("depth", TABLE)
def test_table_of_the_specification(depth):
    made = plan(depth)
    assert made.scaling is not None
    counted = num_scaling_params(made.config), made.n_params, made.scaling.tokens, made.total_batch_size
    scaling_params, params, flops, tokens, batch, steps, rates, decay = TABLE[depth]
    assert (*counted, made.num_iterations) == (scaling_params, params, tokens, batch, steps)
    assert float(f"{made.flops_per_token:.3e}") == flops
    assert round(made.scaling.rates, 4) == rates
    assert made.hyper.weight_decay == pytest.approx(decay, rel=5e-5)
    assert made.hyper.matrix_lr == pytest.approx(0.02 * rates, rel=1e-4)


def test_speedrun():
    """Depth 24 at ratio 8: batch, rates and decay do not depend on the ratio."""
    made, usual = plan(24, target_param_data_ratio=8.0), plan(24)
    assert made.scaling is not None
    assert (made.scaling.tokens, made.total_batch_size, made.num_iterations) == (5_838_484_992, 2**20, 5_568)
    assert made.hyper.matrix_lr == usual.hyper.matrix_lr
    assert made.hyper.weight_decay == pytest.approx(usual.hyper.weight_decay, rel=1e-9)


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "schedules_modern.json").read_text(encoding="utf-8"))


def test_recorded_command_lines(recorded):
    """Counts, horizon, batch, factors and the initial settings of every group; other widths, windows and contexts."""
    for case in recorded["scaling"]:
        given = dict(zip(case["argv"][::2], case["argv"][1::2], strict=True))
        sizes = {name: case[name] for name in ("n_embd", "n_head", "n_kv_head", "n_layer", "sequence_len")}
        pattern = given.get("--window-pattern", "SSSL")
        config = GPTConfig.modern(**sizes, vocab_size=recorded["vocab_size"], window_pattern=pattern)
        counts, theirs = num_params_by_group(config), case["param_counts"]
        assert (counts[MATRICES], counts["value_embeds"]) == (theirs["transformer_matrices"], theirs["value_embeds"])
        assert (num_params(config), flops_per_token(config)) == (theirs["total"], case["num_flops_per_token"])

        aspect, head = int(given.get("--aspect-ratio", 64)), int(given.get("--head-dim", 128))
        width = -(-12 * aspect // head) * head
        reference = dataclasses.replace(config, n_layer=12, n_embd=width, n_head=width // head, n_kv_head=width // head)
        batch = int(given["--total-batch-size"]) if "--total-batch-size" in given else None
        ratio = float(given.get("--target-param-data-ratio", 12))
        ours = scaling.scaling(config, ratio, batch, reference)
        assert (ours.tokens, ours.reference_tokens) == (case["target_tokens"], case["D_REF"])
        assert ours.total_batch_size == case["total_batch_size"]
        assert ours.rates == pytest.approx(case["batch_lr_scale"], rel=1e-12)
        hyper = ours.applied(HYPER)
        assert hyper.weight_decay == pytest.approx(case["weight_decay_scaled"], rel=1e-12)
        _compare_groups(case["optimizer_groups"], hyper, config)


def _compare_groups(recorded, hyper: OptimHyper, config: GPTConfig) -> None:
    rates, settings = initial_learning_rates(hyper, config.n_embd), adamw_settings(hyper)
    names = {
        "lm_head.weight": "unembedding",
        "transformer.wte.weight": "embedding",
        "resid_lambdas": "resid_lambdas",
        "x0_lambdas": "x0_lambdas",
        "smear_gate.weight": "smear_gate",
        "smear_lambda": "smear_lambda",
        "backout_lambda": "backout_lambda",
    }
    for group in recorded:
        if group["kind"] == "muon":
            assert rates[MATRICES] == pytest.approx(group["initial_lr"], rel=1e-12)
            assert hyper.weight_decay == pytest.approx(group["weight_decay"], rel=1e-12)
            continue
        for name in {names.get(parameter, "value_embeds") for parameter in group["params"]}:
            row = settings[name]
            assert rates[name] == pytest.approx(group["initial_lr"], rel=1e-12), name
            assert [row.b1, row.b2] == group["betas"]
            assert (row.eps, row.weight_decay) == (group["eps"], group["weight_decay"])


def test_horizon_batch_and_rates_given_instead_of_derived(recorded):
    case = next(c for c in recorded["scaling"] if "--target-flops" in c["argv"])
    assert plan(12, target_flops=1e18).num_iterations == case["num_iterations"]
    given = plan(4, num_iterations=123, target_param_data_ratio=-1.0)
    assert given.num_iterations == 123 and given.total_batch_size == 2**18
    small = plan(4, total_batch_size=4096, num_iterations=10, max_seq_len=256)
    assert small.hyper.matrix_lr == pytest.approx(0.02 * (4096 / 2**19) ** 0.5)
    assert plan(4, total_batch_size=4096, num_iterations=10, max_seq_len=256, scale_rates=False).hyper == HYPER
    with pytest.raises(PlanError, match="less than one step"):
        plan(4, target_param_data_ratio=1e-9)
    with pytest.raises(PlanError, match="--total_batch_size must be at least 1"):
        plan(4, total_batch_size=0)
    with pytest.raises(PlanError, match="12 tokens per parameter"):
        plan(4, target_param_data_ratio=0.0)
    with pytest.raises(PlanError, match="--device_batch_size=16 or 32"):
        plan(4, device_batch_size=24, max_seq_len=2048)


def test_flops_do_not_collapse():
    """Under fp8 the reference counts attention alone (4.775e9 becomes 3.964e8), since its layers change their class."""
    config = plan(24).config
    attention = sum(12 * config.n_embd * min(w or config.sequence_len, config.sequence_len) for w in config.windows)
    assert attention == pytest.approx(3.964e8, rel=1e-3)
    assert flops_per_token(config) == pytest.approx(4.775e9, rel=1e-3)


def test_the_plan_says_what_it_derived():
    text = plan(24, devices=8, device_batch_size=16).describe()
    for words in (
        "1,384,122,122 (679,478,976 in matrices)",
        "1,048,576 tokens = 16 rows x 2,048 tokens x 8 devices x 4 accumulated",
        "8,352 (from --target_param_data_ratio)",
        "0.059738 (matrices, along a cosine to 0)",
        "729,810,624 parameters count; relative to depth 12: rates x 1.4142, weight decay x 0.2134",
        "40 steps up, constant, 5,429 steps down to 0.05",
    ):
        assert words in text, words
