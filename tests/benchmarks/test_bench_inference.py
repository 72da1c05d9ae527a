"""The inference benchmark: what it counts, against slow counts; and one small run of all of it."""

import json
import math

import jax
import pytest

from benchmarks import bench_inference, serve_load
from benchmarks.bench_inference import BenchSettings, Costs, Timing, json_line, main, numbers, summary, upper_median
from benchmarks.streams import Stream, events
from nanochat_jax.model import gpt

CONFIGS = [
    gpt.GPTConfig(sequence_len=512, vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=64),
    gpt.GPTConfig(sequence_len=512, vocab_size=300, n_layer=4, n_head=2, n_kv_head=2, n_embd=32, window_pattern="SSL"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_costs_equal_a_slow_count(config):
    costs = Costs(config, itemsize=2)
    tree = gpt.abstract(config)
    kernels = [math.prod(leaf.shape) for name, part in tree.items() if name != "wte" for leaf in jax.tree.leaves(part)]
    assert costs.linear_params == sum(kernels)
    assert costs.weight_bytes == 2 * sum(kernels)
    assert costs.kv_bytes_per_token == 2 * 2 * config.n_layer * config.n_kv_head * config.head_dim

    def pairs(layer, position):  # the keys that the token at `position` looks at, one by one
        window = config.window(layer)
        return len([k for k in range(position + 1) if window is None or position - k <= window])

    layers = range(config.n_layer)
    for context in (1, 100, 129, 400):
        seen = [pairs(layer, context - 1) for layer in layers]
        assert costs.kv_read(context) == sum(2 * config.n_kv_head * config.head_dim * 2 * n for n in seen)
        flops = 2 * sum(kernels) + sum(4 * config.n_embd * n for n in seen)
        assert costs.decode_flops(context) == flops
        assert costs.step_bytes(3, context) == costs.weight_bytes + 3 * (costs.kv_read(context) + 2 * config.n_embd)
    head = config.vocab_size * config.n_embd
    whole = sum(costs.decode_flops(n + 1) for n in range(300))  # a prompt, token by token, is its tokens' decoding
    assert costs.prefill_flops(300) == whole - 2 * head * 299  # with the unembedding once


def test_summary():
    timings = [Timing(3.0, [(1.0, 10), (0.5, 10)]), Timing(1.0, [(2.0, 10), (0.5, 10)])]
    found = summary(timings, rows=4)
    assert found == {"ttft_sec": 2.0, "tpot_sec": 0.1, "tok_per_sec": 4 * 40 / 4.0, "decode_steps": 20}
    assert summary([Timing(1.0, [])], rows=1)["tok_per_sec"] == 0.0
    assert upper_median([1, 2, 3, 4]) == 3


def test_json_line_is_json():
    line = json_line({"a": float("inf"), "b": [1.5, float("nan")], "c": {"d": None}})
    assert json.loads(line) == {"a": None, "b": [1.5, None], "c": {"d": None}} and "\n" not in line


@pytest.mark.parametrize(
    "flag", ["--batch_sizes=1,x", "--batch_sizes=0", "--prompt_lengths=", "--decode_tokens=1", "--repeats=0"]
)
def test_bad_flags(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        main([flag])
    assert stop.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err
    assert numbers("1, 2,16", "x") == [1, 2, 16]


def test_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert main([]) == 1
    assert "no trained model" in capsys.readouterr().err


def test_a_small_run(monkeypatch, capsys):
    monkeypatch.setattr(bench_inference, "measure_bandwidth", lambda n: (1e10, "given"))
    monkeypatch.setattr("nanochat_jax.hardware.devices.peak_flops", lambda: (1e11, "given"))
    settings = BenchSettings(depth=1, vocab_size=300, sequence_len=64, prompt_tokens=500, decode_tokens=8,
                             batch_sizes="1", prompt_lengths="64,128", repeats=2)  # fmt: skip
    result = json.loads(json_line(bench_inference.bench(settings)))
    assert result["source"] == "random d1" and result["prompt_tokens"] == 56, "what the context leaves"
    assert [(e["batch_size"], e["decode_steps"]) for e in result["sweep"]] == [(1, 6)], "two came with the first call"
    assert [e["prompt_tokens"] for e in result["prefill"]] == [64], "128 do not fit"
    costs = Costs(gpt.GPTConfig.from_depth(1, 300, 64), 4)
    for e in result["sweep"]:
        assert e["ttft_sec"] > 0 and e["tpot_sec"] > 0 and e["tok_per_sec"] > 0
        steps = e["tok_per_sec"] / e["batch_size"]
        assert e["mbu_percent"] == pytest.approx(100 * steps * costs.step_bytes(e["batch_size"], 60) / 1e10)
        assert e["mfu_percent"] == pytest.approx(100 * e["tok_per_sec"] * costs.decode_flops(60) / 1e11)
    out = capsys.readouterr().out
    assert "given" in out and out.count("\n      1 ") == 1


# --- benchmarks/serve_load.py -----------------------------------------------------------------------------------------


def test_percentile_is_the_nearest_rank():
    values = list(range(1, 101))
    assert [serve_load.percentile(values[::-1], q) for q in (0, 1, 50, 99, 100)] == [1, 1, 50, 99, 100]


def test_slope():
    assert serve_load.slope([0, 1, 2, 3], [5, 7, 9, 11]) == pytest.approx(2)
    assert serve_load.slope([1], [5]) == serve_load.slope([], []) == 0.0


def test_metrics_are_read():
    text = '# HELP x_y a\n# TYPE x_y gauge\nx_y 3.0\nx_y_total 5\nz{a="b"} 1e3\n'
    assert serve_load.metric(text, "x_y") == 3.0 and serve_load.metric(text, "z") == 1000.0
    with pytest.raises(ValueError, match="no metric y"):
        serve_load.metric(text, "y")


def test_events_are_read():
    lines = ["", ": comment", 'data: {"a": 1}', "event: x", "data: [DONE]"]
    assert list(events(lines)) == [{"a": 1}]


def test_fairness_and_verdicts():
    streams = [Stream(0.1 * i, 2.0, 20, "length") for i in range(1, 4)]
    streams.append(Stream(0.4, 3.0, 10, "stop"))
    figures = serve_load.fairness(streams)
    assert figures["first_max_sec"] == 0.4 and figures["streams_measured"] == 4
    assert figures["slowest_to_median"] == 1.0 and figures["full_streams"] == 3, "full streams only"
    assert serve_load.fairness(streams[1:])["slowest_to_median"] == pytest.approx(3), "per token"
    told = serve_load.as_vllm([Stream(0.5, 2.5, 5, "length", (1.0, 0.5)), Stream(0.25, 0.25, 1, "stop")], 2.0)
    assert told["request_throughput"] == 1 and told["output_throughput"] == 3 and told["p99_ttft_ms"] == 500
    assert told["p50_tpot_ms"] == 500 and told["p99_itl_ms"] == 1000 and {*told} == {*serve_load.VLLM_FIGURES}
    result = {"throughput_ratio": 4.0, "many_slowest_to_median": 2.1, "health_p99_ms": 3.0, "http_to_bare": 0.8,
              "http_to_bare_one_slot": 0.9}  # fmt: skip
    said = serve_load.verdicts({**result, "cancel": {"busy": 0.0, "queued": 1.0, "rss_bytes_per_request": 3.2}})
    reached = [line.split()[-1] == "reached" for line in said[:7]]
    assert reached == [True, False, True, False, True, True, False] and "MISSED" in said[1]


def test_a_run_of_random_weights_can_be_loaded(tmp_path, monkeypatch):
    from nanochat_jax.runs.checkpoint import load_model

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    settings = serve_load.ServeLoadSettings(depth=1, vocab_size=600, sequence_len=32)
    name = serve_load.random_run(tmp_path, settings)
    config, _, tokenizer, meta = load_model()
    assert (meta["run"], meta["stage"], config.vocab_size, tokenizer.vocab_size) == (name, "base", 600, 600)
    assert tokenizer.decode(tokenizer.encode_text("Once upon a time 7")) == "Once upon a time 7"
