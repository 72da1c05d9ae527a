"""The derived numbers of a run against the reference's table, and the errors of impossible runs."""

import dataclasses
import json
from typing import Any

import jax
import pytest

from nanochat_jax.model.gpt import abstract
from nanochat_jax.planner.plan import BasePlan, PlanError
from nanochat_jax.stages import base
from nanochat_jax.training.optim import OptimHyper


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "lr_v1.json").read_text(encoding="utf-8"))


def test_depth_table(recorded):
    """The reference's defaults on 8 devices; its even depths and the odd ones for which its rule works."""
    for row in recorded["depth_table"]:
        plan = BasePlan.derive(depth=row["depth"], vocab_size=row["vocab_size"], devices=8)
        ours = {
            "depth": plan.depth,
            "vocab_size": plan.config.vocab_size,
            "num_layers": plan.config.n_layer,
            "model_dim": plan.config.n_embd,
            "num_heads": plan.config.n_head,
            "num_kv_heads": plan.config.n_kv_head,
            "num_params": plan.n_params,
            "num_flops_per_token": plan.flops_per_token,
            "num_iterations": plan.num_iterations,
            "total_tokens": plan.total_tokens,
            "grad_accum_steps": plan.grad_accum,
        }
        assert plan.lr_scale == pytest.approx(row["dmodel_lr_scale"], rel=1e-12)
        assert ours == {k: v for k, v in row.items() if k != "dmodel_lr_scale"}
        assert plan.horizon == "target_param_data_ratio"


def test_target_flops_table(recorded):
    for row in recorded["target_flops_table"]:
        plan = BasePlan.derive(depth=row["depth"], vocab_size=row["vocab_size"], target_flops=row["target_flops"])
        assert (plan.num_iterations, plan.flops_per_token) == (row["num_iterations"], row["num_flops_per_token"])
        assert plan.horizon == "target_flops"
        assert plan.total_flops == pytest.approx(row["target_flops"], rel=1e-3)


def test_horizon_order():
    both: dict[str, Any] = dict(depth=4, vocab_size=65536, target_flops=1e17, target_param_data_ratio=20.0)
    assert BasePlan.derive(**both, num_iterations=7).num_iterations == 7
    assert BasePlan.derive(**both).num_iterations == 1318
    assert BasePlan.derive(**{**both, "target_flops": -1.0}).num_iterations == 1400


@pytest.mark.parametrize("depth", [3, 5, 6, 9, 13])
def test_depths_that_fail_in_the_reference_work(depth):
    """5, 9 and 13 give heads that do not divide the width there."""
    plan = BasePlan.derive(depth=depth, vocab_size=4096)
    assert plan.config.n_embd % plan.config.n_head == 0 and plan.config.n_embd >= 64 * depth


def test_state_bytes_count_every_array():
    plan = BasePlan.derive(depth=2, vocab_size=1000, num_iterations=1)
    sizes = {p[0].key: 0 for p, _ in jax.tree_util.tree_leaves_with_path(abstract(plan.config))}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(plan.config)):
        sizes[path[0].key] += leaf.size
    moments = 2 * (sizes["wte"] + sizes["lm_head"]) + sizes["h"]
    assert plan.state_bytes() == 4 * (2 * sum(sizes.values()) + moments)
    four = BasePlan.derive(depth=2, vocab_size=1000, num_iterations=1, devices=4)
    assert four.state_bytes() == 4 * (2 * sum(sizes.values()) + moments // 4)


def test_description_holds_everything():
    text = BasePlan.derive(
        depth=4, vocab_size=65536, devices=2, hyper=OptimHyper(warmup_ratio=0.1, final_lr_frac=0.1)
    ).describe()
    for words in (
        "4 layers, width 256, 2 heads of 128",
        "65,536",
        "36,700,160",
        "144,703,488",
        "524,288 tokens = 32 rows x 2,048 tokens x 2 devices x 4 accumulated",
        "1,400 (from --target_param_data_ratio)",
        "734,003,200 (20 per parameter)",
        "1.062e+17",
        "0.34641 (base rate x 1.7321",
        "140 steps up, constant, 280 steps down to 0.1",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(device_batch_size=48), "--total_batch_size=491520 or 589824, or --device_batch_size=32 or 64"),
        (dict(total_batch_size=1000), "use --total_batch_size=65536$"),
        (dict(device_batch_size=512), "--total_batch_size=1048576, or --device_batch_size=256"),
        (dict(devices=3), "32 rows x 2048 tokens x 3 devices"),
        (dict(num_iterations=0), "--num_iterations must be positive, or -1"),
        (dict(num_iterations=-5), "--num_iterations must be positive, or -1"),
        (dict(target_flops=1e3), "--target_flops=1000 buys no step"),
        (dict(target_param_data_ratio=0.0), "--target_param_data_ratio is 0"),
        (dict(target_param_data_ratio=0.01), "less than one step"),
        (dict(depth=0), "--depth must be at least 1"),
        (dict(max_seq_len=0), "--max_seq_len must be at least 1"),
        (dict(device_batch_size=0), "--device_batch_size must be at least 1"),
        (dict(total_batch_size=-1), "--total_batch_size must be at least 1"),
        (dict(hyper=OptimHyper(warmup_ratio=2.0)), "--warmup_ratio is a fraction"),
    ],
)
def test_impossible_plans_name_flag_and_remedy(change, words):
    with pytest.raises(PlanError, match=words):
        BasePlan.derive(**{"depth": 4, "vocab_size": 4096, **change})


@pytest.mark.parametrize("change", [dict(device_batch_size=48), dict(total_batch_size=1000), dict(devices=3)])
def test_the_proposed_values_work(change):
    """Every value an error proposes is accepted in place of the one it complains about."""
    flags: dict[str, Any] = {"depth": 2, "vocab_size": 4096, "num_iterations": 1, **change}
    with pytest.raises(PlanError) as error:
        BasePlan.derive(**flags)
    proposals = str(error.value).split("; use ")[1].split(", or ")
    assert proposals
    for proposal in proposals:
        flag, _, values = proposal.partition("=")
        for value in values.split(" or "):
            assert BasePlan.derive(**{**flags, flag.removeprefix("--"): int(value)}).grad_accum >= 1


SETTINGS = dataclasses.replace(
    base.DEMO, device_batch_size=4, num_iterations=10, matrix_lr=0.01, embedding_lr=0.3, weight_decay=0.1, tensor=2
)


def test_a_plan_takes_the_flags_of_the_optimizer_along():
    plan = base.plan_of(SETTINGS, vocab_size=512, devices=2)
    assert (plan.grad_accum, plan.num_iterations, plan.devices, plan.config.vocab_size) == (2, 10, 2, 512)
    assert plan.hyper == OptimHyper(matrix_lr=0.01, embedding_lr=0.3, weight_decay=0.1, warmdown_ratio=0.4)
    assert plan.tensor == 2 and plan.with_rows(2).grad_accum == 4
    with pytest.raises(PlanError, match="--device_batch_size=2 or 4"):
        plan.with_rows(3)


@pytest.mark.parametrize("flag, value", [("matrix_lr", -0.1), ("warmdown_ratio", 1.5)])
def test_a_plan_names_the_flag_of_the_optimizer(flag, value):
    with pytest.raises(ValueError, match=f"--{flag}"):
        base.plan_of(dataclasses.replace(SETTINGS, **{flag: value}), vocab_size=512, devices=1)


def test_devices_that_share_matrices_are_counted():
    plan = BasePlan.derive(depth=4, vocab_size=1024, total_batch_size=524288, num_iterations=5, devices=4)
    assert "devices          4, with" in plan.describe() and "x 4 devices x" in plan.describe()
    shared = dataclasses.replace(plan, tensor=2).describe()
    assert "devices          8, with" in shared and "x 4 groups of 2 devices x" in shared
