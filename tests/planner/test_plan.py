"""The derived numbers of a run against the reference's table, and the errors of impossible runs."""

import dataclasses
from typing import Any

import jax
import pytest

from nanochat_jax.model.gpt import abstract
from nanochat_jax.planner.plan import BasePlan, PlanError
from nanochat_jax.stages import base
from nanochat_jax.training.optim import OptimHyper
from tests.tokenizer_fixtures import golden


def test_depth_table():
    """The reference's defaults on 8 devices; its even depths and the odd ones for which its rule works."""
    for row in golden("lr_v1")["depth_table"]:
        plan = BasePlan.derive(depth=row["depth"], vocab_size=row["vocab_size"], devices=8)
        counted = plan.num_iterations, plan.total_tokens, plan.grad_accum
        assert counted == (row["num_iterations"], row["total_tokens"], row["grad_accum_steps"])
        assert (plan.n_params, plan.flops_per_token) == (row["num_params"], row["num_flops_per_token"])
        assert plan.lr_scale == pytest.approx(row["dmodel_lr_scale"], rel=1e-12)
        assert plan.horizon == "target_param_data_ratio"


def test_target_flops_table():
    for row in golden("lr_v1")["target_flops_table"]:
        plan = BasePlan.derive(depth=row["depth"], vocab_size=row["vocab_size"], target_flops=row["target_flops"])
        assert (plan.num_iterations, plan.flops_per_token) == (row["num_iterations"], row["num_flops_per_token"])
        assert plan.horizon == "target_flops"
        assert plan.total_flops == pytest.approx(row["target_flops"], rel=1e-3)


def test_horizon_order():
    both: dict[str, Any] = dict(depth=4, vocab_size=65536, target_flops=1e17, target_param_data_ratio=20.0)
    assert BasePlan.derive(**both, num_iterations=7).num_iterations == 7
    assert BasePlan.derive(**both).num_iterations == 1318
    assert BasePlan.derive(**{**both, "target_flops": -1.0}).num_iterations == 1400


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
    for figure in ("65,536", "36,700,160", "144,703,488", "524,288", "1,400", "734,003,200", "1.062e+17", "0.34641"):
        assert figure in text, figure


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(device_batch_size=48), "--total_batch_size=491520 or 589824, or --device_batch_size=32 or 64"),
        (dict(total_batch_size=1000), "use --total_batch_size=65536$"),
        (dict(device_batch_size=512), "--total_batch_size=1048576, or --device_batch_size=256"),
        (dict(devices=3), "3 devices"),
        (dict(num_iterations=0), "--num_iterations"),
        (dict(target_flops=1e3), "--target_flops=1000"),
        (dict(target_param_data_ratio=0.01), "less than one step"),
        *(
            (dict.fromkeys([flag], 0), f"--{flag}")
            for flag in ("depth", "max_seq_len", "device_batch_size", "total_batch_size", "target_param_data_ratio")
        ),
        (dict(hyper=OptimHyper(warmup_ratio=2.0)), "--warmup_ratio"),
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
