"""Kept results: written whole, found again, and the figures made of several."""

import json
import re

import numpy as np
import pytest

from nanochat_jax.evals import compare, results
from tests.tokenizer_fixtures import golden


def result(task="GSM8K", right=3, n=10, kind="generative", baseline=0.0, **settings):
    items = [{"id": f"{i}", "correct": int(i < right)} for i in range(n)]
    return results.scored(task, kind, items, baseline, settings, 1.5)


def test_scored_fields():
    r = result("MMLU", 4, 10, "categorical", 0.25, max_problems=10)
    assert r["accuracy"] == 0.4 and r["n"] == 10 and r["centered"] == pytest.approx(0.2)
    low, high = r["interval"]
    assert low < 0.4 < high and len(r["items"]) == 10 and r["settings"] == {"max_problems": 10}


def test_save_and_load(tmp_path):
    run = tmp_path / "sft-d4"
    path = results.save(run, 200, {**result(), "stage": "sft"})
    results.save(run, 200, result("world/sums", 10))
    results.save(run, 1000, result("ARC-Easy"))
    assert path == run / "evals" / "step-00000200" / "GSM8K.json"
    assert results.steps(run) == [200, 1000]
    assert set(results.load(run)) == {"ARC-Easy"} and set(results.load(run, 200)) == {"GSM8K", "world/sums"}
    loaded = results.load(run, 200)["GSM8K"]
    assert {k: loaded[k] for k in result()} == result()
    assert (loaded["run"], loaded["step"], loaded["stage"]) == ("sft-d4", 200, "sft") and loaded["time"][:2] == "20"
    assert results.load(run, 7) == results.load(tmp_path / "nothing") == {}
    assert not [p for p in run.rglob("*") if p.suffix == ".tmp"]


def test_find_wants_the_same_settings_and_a_real_result(tmp_path):
    results.save(tmp_path, 5, result(temperature=0.0, max_problems=None))
    found = results.find(tmp_path, 5, "GSM8K", {"max_problems": None, "temperature": 0.0})
    assert found and found["accuracy"] == 0.3
    assert results.find(tmp_path, 5, "GSM8K", {"temperature": 1.0, "max_problems": None}) is None
    assert results.find(tmp_path, 6, "GSM8K", {}) is None
    results.save(tmp_path, 5, {"task": "HumanEval", "kind": "generative", "settings": {}, "skipped": "no namespaces"})
    assert results.find(tmp_path, 5, "HumanEval", {}) is None


def test_a_result_of_other_settings_is_kept_aside(tmp_path):
    results.save(tmp_path, 5, result(right=9, max_problems=None))
    results.save(tmp_path, 5, result(right=1, max_problems=10))
    results.save(tmp_path, 5, result(right=2, max_problems=10))
    assert results.load(tmp_path)["GSM8K"]["accuracy"] == 0.2
    aside = [p for p in results.folder_of(tmp_path, 5).iterdir() if "earlier" in p.name]
    assert len(aside) == 1 and json.loads(aside[0].read_text())["accuracy"] == 0.9


def test_bad_results_say_so(tmp_path):
    with pytest.raises(results.ResultError, match="bpb"):
        results.save(tmp_path, 1, {"task": "bpb", "kind": "bpb", "bpb": float("inf"), "settings": {}})
    assert results.load(tmp_path) == {}
    with pytest.raises(ValueError, match="\\.\\./x"):
        results.path_of(tmp_path, 1, "../x")
    path = results.save(tmp_path, 1, result())
    for content in ('{"task": "GS', "[]", "{}"):
        path.write_text(content)
        with pytest.raises(results.ResultError, match=r"GSM8K\.json"):
            results.load(tmp_path)


@pytest.mark.parametrize("case", golden("chateval_v1")["chatcore"], ids=lambda c: str(len(c["results"])))
def test_chatcore_golden(case):
    made = {}
    for name, accuracy in case["results"].items():
        own = result(name, round(accuracy * 10_000), 10_000, baseline=results.CHAT_BASELINES[name])
        made[name] = {**own, "accuracy": accuracy}
    figure = results.chatcore(made)
    if "ChatCORE metric" not in case:
        assert figure is None
        return
    assert figure is not None
    assert figure[0] == pytest.approx(case["ChatCORE metric"], abs=1e-12)
    # errors of independent tasks add in squares
    rates, baselines = np.array([[a, results.CHAT_BASELINES[name]] for name, a in case["results"].items()]).T
    expected = 1.96 * np.linalg.norm((rates * (1 - rates) / 10_000) ** 0.5 / (1 - baselines)) / len(rates)
    assert figure[0] - figure[1][0] == pytest.approx(expected, rel=0.1)
    assert figure[1][1] - figure[0] == pytest.approx(expected, rel=0.1)


def test_baselines_are_the_references():
    assert golden("chateval_v1")["baseline_accuracies"] == results.CHAT_BASELINES


def test_table():
    bpb = {"task": "bpb", "kind": "bpb", "bpb": 0.9876543, "interval": None, "settings": {}}
    core = {"task": "CORE", "kind": "core", "accuracy": 0.5, "centered": 0.1, "interval": [0.05, 0.15], "settings": {}}
    samples = {"task": "samples", "kind": "samples", "settings": {}}
    chat = {name: result(name) for name in results.CHAT_BASELINES}
    skipped = {"task": "HumanEval", "kind": "generative", "settings": {}, "skipped": "no namespaces"}
    text = results.table(
        {"sft": {**chat, "world/sums": result("world/sums")}, "base": {"samples": samples, "CORE": core, "bpb": bpb},
         "mid": {**chat, "HumanEval": skipped}}
    )  # fmt: skip
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == ["metric", "BASE", "MID", "SFT"]
    by_name = {row[0]: row[1:] for row in rows[2:]}
    assert list(by_name) == ["bpb", "CORE", *results.CHAT_BASELINES, "world/sums", "ChatCORE"]
    assert by_name["bpb"] == ["0.9877", "-", "-"] and by_name["CORE"][0] == "0.1000 [0.0500, 0.1500]"
    assert by_name["HumanEval"][1] == "skipped" and by_name["GSM8K"][2].startswith("0.3000 [")
    assert by_name["ChatCORE"][:2] == ["-", "-"] and by_name["ChatCORE"][2].startswith("0.")
    assert len({len(line) for line in text.splitlines()}) == 1


# --- comparing two runs ---------------------------------------------------------------------------------------------


def graded(right, n=100, task="GSM8K", first=0, **settings):
    """A result whose problems `right` (numbers) are correct."""
    items = [{"id": f"{i}", "correct": int(i in right)} for i in range(first, n)]
    return results.scored(task, "generative", items, 0.0, settings, 1.0)


def test_compare_verdicts():
    weak, strong = graded(range(40)), graded(range(60))
    found = compare.compare(weak, strong)
    assert (found.verdict, found.n, found.notes) == ("better", 100, ())
    assert found.difference == pytest.approx(0.2) and 0 < found.low < 0.2 < found.high < 0.3 and found.p < 1e-5
    back = compare.compare(strong, weak)
    assert back.verdict == "worse" and (back.difference, back.p) == (-found.difference, found.p)
    assert compare.compare(weak, graded(range(1, 42))).verdict == "cannot tell"
    same = compare.compare(weak, weak)
    assert same.verdict == "cannot tell" and same.p == 1 and same.low < 0 < same.high
    # the same accuracies, but other problems: nothing to tell
    assert compare.compare(graded(range(50)), graded(range(50, 100))).verdict == "cannot tell"


def test_compare_pairs_by_id():
    found = compare.compare(graded(range(80), temperature=0.0), graded(range(50, 200), 120, first=50, temperature=1.0))
    assert found.n == 50 and found.difference == pytest.approx(0.4)
    assert "only the 50 problems that both have (of 100 and 70)" in found.notes[0]
    assert "temperature 0.0 and 1.0" in found.notes[1]
    with pytest.raises(compare.CompareError, match="different problems"):
        compare.compare(graded([], 50), graded([], 100, first=50))
    with pytest.raises(compare.CompareError, match="1 samples.*8"):
        compare.compare(graded([]), graded([], num_samples=8))


def test_compare_shares_of_several_samples():
    def sampled(counts):
        items = [{"id": f"{i}", "correct": int(c > 0), "n_correct": c} for i, c in enumerate(counts)]
        return results.scored("GSM8K", "generative", items, 0.0, {"num_samples": 4}, 1.0)

    found = compare.compare(sampled([1, 2] * 30), sampled([2, 3] * 30))
    assert found.difference == pytest.approx(0.25) and found.verdict == "better"


def test_compare_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    a, b = (tmp_path / "runs" / name for name in ("d4-mid", "d4-sft"))
    for task in ("GSM8K", "world/sums"):
        results.save(a, 100, graded(range(40), task=task))
    results.save(b, 7, graded(range(20)))
    results.save(b, 30, graded(range(60)))
    results.save(b, 30, {"task": "samples", "kind": "samples", "settings": {}, "items": [{"id": "0", "prompt": "x"}]})
    results.save(b, 30, {"task": "HumanEval", "kind": "generative", "settings": {}, "skipped": "no namespaces"})
    assert compare.main(["d4-mid", "d4-sft"]) == 0
    out = capsys.readouterr().out
    assert "d4-sft (step 30) against d4-mid (step 100)" in out and "d4-sft is" in out
    (line,) = [line for line in out.splitlines() if line.startswith("| GSM8K")]
    assert "better" in line and "+0.2000" in line and "100" in line
    assert "only one of the two has: world/sums" in out
    assert compare.main(["d4-mid", "d4-sft@7", "--tasks=GSM8K"]) == 0
    assert "worse" in capsys.readouterr().out
    for arguments, status, message in [
        (["d4-mid"], 2, "1"),
        (["d4-mid", "d4-sft@8"], 1, "step 8 of d4-sft.*7, 30"),
        (["d4-mid", "d5"], 1, "'d5'.*d4-mid, d4-sft"),
        (["d4-mid", "../d5"], 1, r"\.\./d5"),
        (["d4-mid", "d4-sft@x"], 1, "d4-sft@x"),
        (["d4-mid", "d4-sft", "--tasks=MMLU"], 1, "MMLU"),
    ]:
        assert compare.main(arguments) == status
        assert re.search(message, capsys.readouterr().err)
