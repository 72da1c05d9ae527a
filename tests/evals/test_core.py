"""CORE against the reference's numbers: shots, prompts, tokens, spans, losses, decisions, centring."""

import json

import jax
import numpy as np
import pytest

from nanochat_jax.evals.core import centered, evaluate_core, evaluate_task
from nanochat_jax.evals.core_bundle import CoreTask, open_bundle
from nanochat_jax.evals.core_prompts import (
    NotAPrefixError,
    build_prompts,
    common_length,
    fewshot_indices,
    find_spans,
    item_order,
)
from nanochat_jax.evals.scorer import Scorer
from nanochat_jax.utils.progress import ShareProgress
from tests.golden_models import golden_model
from tests.tokenizer_fixtures import golden, golden_tokenizer

CORE = golden("core_v1")
TASKS = {case["label"]: case for case in CORE["tasks"]}


def task_of(case) -> CoreTask:
    baseline = 0.01 * case["random_baseline_percent"]
    delimiter = case["continuation_delimiter"]
    return CoreTask(case["label"], case["task_type"], "", case["num_fewshot"], delimiter, baseline)


@pytest.fixture(scope="module")
def scorer():
    return Scorer(*golden_model(), max_tokens_per_batch=512)


def encode(prompts: list[str]) -> list[np.ndarray]:
    flat, offsets = golden_tokenizer().encode_to_numpy(prompts)
    return [flat[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CORE["tasks"], ids=list(TASKS))
def test_order_shots_prompts_tokens_and_spans_are_the_references(case):
    order = item_order(len(case["items"]), case["max_per_task"])
    assert order == case["shuffled_file_indices_used"]
    shown = [case["items"][i] for i in order]
    assert len(case["examples"]) == len(shown)
    for example in case["examples"]:
        index = example["idx"]
        picked = fewshot_indices(len(shown), index, case["num_fewshot"])
        assert picked == example["fewshot_indices"]
        shots = [shown[i] for i in picked]
        prompts = build_prompts(case["task_type"], shown[index], shots, case["continuation_delimiter"])
        assert prompts == example["prompts"]
        spans = find_spans(case["task_type"], encode(prompts))
        assert [row.tolist() for row in spans.tokens] == example["tokens"]
        assert spans.starts == example["start_idxs"] and spans.ends == example["end_idxs"]


@pytest.mark.parametrize("case", CORE["find_common_length"])
def test_common_length(case):
    step = 1 if case["direction"] == "left" else -1
    assert common_length([row[::step] for row in case["sequences"]]) == case["result"]


def test_too_few_items_for_the_shots():
    with pytest.raises(ValueError, match="10 .* 11 .* 4"):
        fewshot_indices(4, 0, 10)


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CORE["tasks"], ids=list(TASKS))
def test_every_decision_is_the_references(case, scorer):
    order = item_order(len(case["items"]), case["max_per_task"])
    result = evaluate_task(scorer, golden_tokenizer(), task_of(case), case["items"], order)
    assert [bool(item["correct"]) for item in result["items"]] == [e["is_correct"] for e in case["examples"]]
    assert [item["id"] for item in result["items"]] == case["shuffled_file_indices_used"]
    assert result["accuracy"] == pytest.approx(case["accuracy"], abs=1e-6)
    assert result["centered"] == pytest.approx(case["centered"], abs=1e-6)
    assert result["n"] == len(case["examples"]) and result["unscored"] == 0
    low, high = result["interval"]
    assert 0 <= low <= result["accuracy"] <= high <= 1


@pytest.mark.parametrize("case", CORE["evaluate_task_unshuffled"], ids=list(TASKS))
def test_every_decision_in_file_order(case, scorer):
    of = TASKS[case["label"]]
    n = len(case["is_correct"])
    result = evaluate_task(scorer, golden_tokenizer(), task_of(of), of["items"][:n], range(n))
    assert [bool(item["correct"]) for item in result["items"]] == case["is_correct"]
    assert result["accuracy"] == pytest.approx(case["accuracy"], abs=1e-6)


@pytest.mark.parametrize("case", CORE["tasks"], ids=list(TASKS))
def test_losses_and_first_choices(case, scorer):
    rows = [
        (np.array(ids), start, end)
        for e in case["examples"]
        for ids, start, end in zip(e["tokens"], e["start_idxs"], e["end_idxs"], strict=True)
    ]
    found = scorer.spans(rows)
    if case["task_type"] == "language_modeling":
        expected = [e["predicted_tokens"] == e["actual_tokens"] for e in case["examples"]]
        assert [greedy for _, greedy, _ in found] == expected
        return
    losses = [loss for e in case["examples"] for loss in e["mean_losses"]]
    # A reference loss of null (NaN) is an empty span.
    np.testing.assert_allclose([f[0] for f in found], [np.nan if x is None else x for x in losses], rtol=2e-5)


def test_losses_of_every_position(scorer):
    case = CORE["forward_model"]
    for ids, losses in zip(case["input_ids"], case["losses"], strict=True):
        (_, _, nll), *_ = scorer.spans([(ids, 1, len(ids))])
        np.testing.assert_allclose(nll, losses[:-1], rtol=2e-5, atol=2e-5)


def test_prompts_that_are_too_long_lose_their_beginning(scorer):
    case = CORE["truncation"]
    of = TASKS[case["task"]]
    short = Scorer(scorer.config, scorer.params, max_tokens_per_batch=512, max_length=case["max_seq_len"])
    n = len(case["examples"])
    result = evaluate_task(short, golden_tokenizer(), task_of(of), of["items"], range(n))
    assert [bool(item["correct"]) for item in result["items"]] == [e["is_correct"] for e in case["examples"]]
    assert result["accuracy"] == pytest.approx(case["accuracy"], abs=1e-6)
    whole = {e["prompts"][0]: e for e in of["examples"]}
    cropped = 0
    for example in case["examples"]:
        before = whole[example["prompts"][0]]
        rows = zip(before["tokens"], before["start_idxs"], before["end_idxs"], strict=True)
        found = short.spans([(np.array(ids), start, end) for ids, start, end in rows])
        np.testing.assert_allclose([f[0] for f in found], example["mean_losses"], rtol=2e-5)
        cropped += sum(len(ids) > case["max_seq_len"] for ids in before["tokens"])
    assert cropped > 0 and short.stats.cropped == 2 * cropped


def test_a_continuation_that_changes_the_prompts_tokens(scorer):
    case = CORE["lm_not_a_prefix"]
    item, kind = case["item"], "language_modeling"
    prompts = build_prompts(kind, item, [], case["continuation_delimiter"])
    assert prompts == case["prompts"]
    with pytest.raises(NotAPrefixError):
        find_spans(kind, encode(prompts))
    task = CoreTask("odd", kind, "", 0, case["continuation_delimiter"])
    good = {"context": "Every journey begins with a", "continuation": " map"}
    result = evaluate_task(scorer, golden_tokenizer(), task, [item, good], [0, 1])
    assert result["unscored"] == 1 and result["n"] == 2 and result["items"][0] == {"id": 0, "correct": 0}


@pytest.mark.parametrize(
    "kind, options, gold, correct",
    [
        ("multiple_choice", ["same", "same"], 0, 1),  # nothing tells them apart: the first, as the reference
        ("multiple_choice", ["same", "same"], 1, 0),
        ("schema", ["same", "same"], 0, 1),
        ("multiple_choice", ["the harbor", "the harbor wall"], 0, 1),  # an empty span is NaN: in first place it wins
        ("multiple_choice", ["the harbor wall", "the harbor"], 1, 0),  # ... and loses elsewhere
    ],
)
def test_options_that_leave_nothing_to_score(kind, options, gold, correct, scorer):
    fields = {"query": "Say", "choices": options} if kind == "multiple_choice" else {"context_options": options}
    item = {**fields, "continuation": "again", "gold": gold}
    result = evaluate_task(scorer, golden_tokenizer(), CoreTask("odd", kind, "", 0), [item], [0])
    assert result["items"] == [{"id": 0, "correct": correct}]


# --- the metric -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path):
    """The golden tasks as a bundle on disk."""
    entries, rows = [], ["Eval Task,Random baseline"]
    for case in CORE["tasks"]:
        file = f"some/{case['label']}.jsonl"
        entry = {"label": case["label"], "icl_task_type": case["task_type"], "dataset_uri": file}
        more = {"num_fewshot": [case["num_fewshot"], 99], "continuation_delimiter": case["continuation_delimiter"]}
        entries.append(entry | more)
        rows.append(f"{case['label']},{case['random_baseline_percent']}")
        path = tmp_path / "eval_data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in case["items"]), encoding="utf-8")
    (tmp_path / "core.yaml").write_text(json.dumps({"icl_tasks": entries}), encoding="utf-8")  # JSON is YAML
    (tmp_path / "eval_meta_data.csv").write_text("\n".join(rows), encoding="utf-8")
    return open_bundle(tmp_path)


def test_the_metric_is_the_references(bundle, scorer, capsys):
    case = CORE["evaluate_model_max4"]
    with ShareProgress("CORE") as progress:
        result = evaluate_core(scorer, golden_tokenizer(), bundle, max_per_task=case["max_per_task"], progress=progress)
    assert result["centered"] == pytest.approx(case["core_metric"], abs=1e-6)
    assert {k: r["accuracy"] for k, r in result["tasks"].items()} == pytest.approx(case["results"], abs=1e-6)
    assert {k: r["centered"] for k, r in result["tasks"].items()} == pytest.approx(case["centered_results"], abs=1e-6)
    low, high = result["interval"]
    assert low < result["centered"] < high
    assert "skipped" not in result
    json.dumps(result, allow_nan=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == list(TASKS), "one line for every task"


def test_too_few_items_are_refused_at_once(bundle, scorer):
    shots = max(case["num_fewshot"] for case in TASKS.values())
    with pytest.raises(ValueError, match=f"--max_per_task={shots} .* {shots + 1} "):
        evaluate_core(scorer, golden_tokenizer(), bundle, max_per_task=shots)


def test_nothing_is_compiled_for_another_pass(bundle, scorer):
    evaluate_core(scorer, golden_tokenizer(), bundle)
    compiled = scorer.compiled_programs()
    scorer.params = jax.tree.map(lambda x: x + 0, scorer.params)
    evaluate_core(scorer, golden_tokenizer(), bundle, max_per_task=max(c["num_fewshot"] for c in TASKS.values()) + 1)
    assert scorer.compiled_programs() == compiled


@pytest.mark.parametrize("case", CORE["centering"])
def test_centring(case):
    baseline = 0.01 * case["random_baseline_percent"]
    assert centered(case["accuracy"], baseline) == pytest.approx(case["centered"], abs=1e-7)
