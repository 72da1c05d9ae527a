"""The memory formula against steps compiled for H100s, and that compiling (slow, with the CUDA plugin) still agrees."""

import pytest

from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.planner import compile as compiled
from nanochat_jax.planner import memory
from nanochat_jax.planner.compile import Case

# (depth, rows, accumulation, remat, GPUs, vocabulary, tokens per row): GiB per GPU, arguments and temporaries, compiled
# with jax 0.10.2 for H100s (benchmarks/calibrate_memory.py prints such numbers).
COMPILED = {
    (8, 8, 2, "none", 8, 65536, 2048): 3.30,
    (8, 32, 2, "none", 8, 65536, 2048): 7.28,
    (8, 32, 1, "none", 8, 65536, 2048): 7.28,
    (4, 32, 2, "none", 8, 65536, 2048): 2.76,
    (12, 8, 4, "none", 8, 65536, 2048): 5.88,
    (8, 16, 2, "none", 8, 16384, 1024): 2.75,
    (8, 1, 8, "none", 1, 65536, 2048): 2.87,
    (20, 16, 2, "none", 8, 65536, 2048): 22.85,
    (20, 32, 1, "none", 8, 65536, 2048): 38.78,
    (8, 8, 2, "mlp", 8, 65536, 2048): 2.77,
    (8, 32, 2, "mlp", 8, 65536, 2048): 5.25,
    (20, 32, 1, "mlp", 8, 65536, 2048): 25.80,
    (8, 8, 2, "block", 8, 65536, 2048): 2.11,
    (8, 32, 2, "block", 8, 65536, 2048): 2.64,
    (20, 32, 1, "block", 8, 65536, 2048): 10.23,
    # not among those that the formula was fitted to
    (26, 32, 1, "none", 8, 65536, 2048): 60.3,
    (32, 16, 2, "none", 8, 65536, 2048): 60.3,
    (32, 32, 1, "block", 8, 65536, 2048): 27.1,
}


@pytest.mark.parametrize("shape", COMPILED)
def test_formula_is_as_good_as_it_says(shape):
    depth, rows, _, remat, gpus, vocab, T = shape
    config = GPTConfig.from_depth(depth, vocab, T)
    estimate = memory.estimate(config, rows, memory.Mesh(gpus), remat)
    assert estimate / 2**30 == pytest.approx(COMPILED[shape], rel=memory.ERROR)


@pytest.mark.slow
@pytest.mark.skipif(compiled.plugin_version() is None, reason="compiling for a GPU needs the CUDA plugin")
def test_a_step_compiled_for_eight_h100s(tmp_path, monkeypatch):
    """Without a GPU: the state as the formula says, one reduction of every gradient, no loop around it, cuDNN."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    case = Case("step", "h100", 8, 4, 4096, 512, 8, 2)
    [facts] = compiled.results([case])
    assert facts["unknown_loops"] == 0 and facts["cudnn_attention"] == [4, 4]
    assert not any(c["in_loop"] for c in facts["collectives"])
    scattered = sum(c["tensors"] for c in facts["collectives"] if c["kind"] == "reduce-scatter")
    assert scattered == 5  # two embeddings and three stacks of matrices
    state = facts["params_bytes"] + facts["optimizer_bytes"]
    assert facts["donated_bytes"] == pytest.approx(state, rel=0.01)
    assert state == pytest.approx(memory.state_bytes(GPTConfig.from_depth(4, 4096, 512), memory.Mesh(8)), rel=0.01)
    assert facts["flops"] > 0 and facts["memory_traffic"] > 0 and facts["bytes"] > state
