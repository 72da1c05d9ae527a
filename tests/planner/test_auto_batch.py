"""The choice of the device batch size: on invented memory, on real compilations, and that the mathematics stays."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nanochat_jax.hardware.devices import is_out_of_memory
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.parallel import sharding
from nanochat_jax.planner import fit_batch
from nanochat_jax.planner.fit_batch import MARGIN, DoesNotFit, bytes_needed, choose, halved, sizes
from nanochat_jax.stages.batch_size import usual_rows
from nanochat_jax.training.optim import OptimHyper, make_optimizer
from nanochat_jax.training.step import abstract_state, make_train_step

GIB = 2**30


def test_sizes_are_the_powers_of_two_that_divide():
    assert sizes(32) == [1, 2, 4, 8, 16, 32]
    assert sizes(12) == [1, 2, 4]
    assert sizes(7) == [1]
    with pytest.raises(ValueError, match="--total_batch_size"):
        sizes(0)


def test_aliased_results_count_once():
    fake = SimpleNamespace(
        argument_size_in_bytes=100, output_size_in_bytes=90, alias_size_in_bytes=80, temp_size_in_bytes=1000,
        generated_code_size_in_bytes=5,
    )  # fmt: skip
    assert bytes_needed(fake) == 100 + 90 - 80 + 1000 + 5


class Measured:
    """A device on which `rows` need fixed + rows * each bytes; remembers what was asked."""

    def __init__(self, fixed: float, each: float, dies_from: int = 10**9):
        self.fixed, self.each, self.dies_from, self.asked = fixed, each, dies_from, []

    def __call__(self, rows: int) -> int | None:
        self.asked.append(rows)
        return None if rows >= self.dies_from else int(self.fixed + rows * self.each)


@pytest.mark.parametrize("guess", [None, lambda r: 0.0, lambda r: 1e18, lambda r: 3 * GIB + r * 2 * GIB])
@pytest.mark.parametrize("limit", range(6, 80, 7))
def test_the_largest_that_fits_with_its_margin(guess, limit):
    device = Measured(3 * GIB, 2 * GIB)
    choice = choose(64, device, limit * GIB, guess)
    allowed = limit * GIB * (1 - MARGIN)
    assert 3 * GIB + choice.rows * 2 * GIB <= allowed
    assert choice.rows == 64 or 3 * GIB + 2 * choice.rows * 2 * GIB > allowed
    assert len(device.asked) == len(set(device.asked))  # nothing is compiled twice


def test_a_good_guess_saves_compilations():
    device = Measured(3 * GIB, 2 * GIB)
    assert choose(64, device, 40 * GIB, lambda r: 3 * GIB + r * 2 * GIB).rows == 16
    assert device.asked == [16, 32]
    device = Measured(3 * GIB, 2 * GIB)
    assert choose(64, device, 40 * GIB).rows == 16
    assert device.asked == [64, 32, 16]  # without one: from the top


def test_a_compiler_that_runs_out_of_memory_is_an_answer():
    device = Measured(0, 1, dies_from=8)
    choice = choose(32, device, 10**6)
    assert choice.rows == 4 and choice.needed[8] is None
    assert "8 runs out of memory" in choice.describe(32)


def test_nothing_fits():
    with pytest.raises(DoesNotFit, match=r"5\.0 GiB.*--remat=block.*--fsdp.*--max_seq_len.*--depth"):
        choose(8, Measured(4 * GIB, GIB), 5 * GIB)


def test_description_names_choice_accumulation_and_limit():
    text = choose(64, Measured(3 * GIB, 2 * GIB), 40 * GIB, lambda r: 3 * GIB + r * 2 * GIB).describe(64)
    for words in ("16 rows x 4 accumulated", "16 needs 35.0 GiB", "32 needs 67.0 GiB", "of 40.0 GiB"):
        assert words in text, words


def test_halving():
    assert halved(8) == 4
    with pytest.raises(DoesNotFit, match="--remat=block"):
        halved(1)


def test_out_of_memory_errors_are_told_apart():
    out = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes.")
    assert is_out_of_memory(out)
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: something else"))
    assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))


def test_free_memory():
    stats = {"bytes_limit": 100, "bytes_in_use": 30}
    assert fit_batch.free_memory(SimpleNamespace(memory_stats=lambda: stats)) == 70
    assert fit_batch.free_memory(SimpleNamespace(memory_stats=lambda: None)) is None


def test_a_program_from_the_cache_that_lost_its_plan_of_memory_is_compiled_anew():
    facts = SimpleNamespace(
        argument_size_in_bytes=1, output_size_in_bytes=1, alias_size_in_bytes=1, temp_size_in_bytes=5,
        generated_code_size_in_bytes=0,
    )  # fmt: skip
    cached = []

    def lower():
        cached.append(jax.config.jax_enable_compilation_cache)
        analysis = None if cached[-1] else facts
        return SimpleNamespace(compile=lambda: SimpleNamespace(memory_analysis=lambda: analysis))

    before = jax.config.jax_enable_compilation_cache
    assert fit_batch.measured(lower) == 6 and cached == [True, False]
    assert jax.config.jax_enable_compilation_cache == before
    nothing = SimpleNamespace(compile=lambda: SimpleNamespace(memory_analysis=lambda: None))
    with pytest.raises(DoesNotFit, match="--device_batch_size"):
        fit_batch.measured(lambda: nothing)


# ---------------------------------------------------------------------------------------------------------------------
# real programs, on the simulated devices


CONFIG = GPTConfig.from_depth(1, 128, 32)
OPTIMIZER = make_optimizer(OptimHyper(), 10, CONFIG.n_embd)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(jax.devices()[:2])


@pytest.fixture(scope="module")
def step(mesh):
    return make_train_step(CONFIG, OPTIMIZER, mesh, guarded=True)


def test_real_steps_are_measured_and_chosen_among(mesh, step):
    needed = {}

    def measure(rows):
        needed[rows] = fit_batch.measured(
            lambda: fit_batch.lower_step(step, CONFIG, OPTIMIZER, mesh, rows, 8 // rows, 32)
        )
        return needed[rows]

    assert measure(8) > measure(2) > 0
    between = int((needed[8] + needed[2]) / 2 / (1 - MARGIN))
    assert choose(8, lambda rows: needed.get(rows, needed[8]), between).rows == 2


def test_the_lowered_step_is_the_one_that_runs(mesh, step):
    """Same shapes, same program: the compilation cache then serves the run."""
    lowered = fit_batch.lower_step(step, CONFIG, OPTIMIZER, mesh, 2, 4, 32)
    state, tokens = abstract_state(CONFIG, OPTIMIZER, mesh), np.zeros((4, 4, 32), np.int32)
    real = step.lower(state, tokens, tokens, np.zeros((4, 4, 32), np.float32), np.full(2, np.inf, np.float32))
    assert lowered.as_text() == real.as_text()


def test_other_programs_compile_and_are_checked(mesh):
    programs = [
        ("evaluation", lambda: fit_batch.lower_evaluation(CONFIG, mesh, 2, 32), 0),
        ("sampling", lambda: fit_batch.lower_sampling(CONFIG, jax.devices()[0], 4, 64), 10 * GIB),
    ]
    fit_batch.check_all(programs, 20 * GIB)
    with pytest.raises(DoesNotFit, match=r"^sampling .*10\.0 GiB.*--slots"):
        fit_batch.check_all(programs, 10 * GIB)
    assert math.isfinite(fit_batch.measured(programs[0][1]) or math.inf)


@pytest.mark.parametrize("most, total, rows", [(32, 8, 8), (32, 64, 32), (32, 12, 4), (16, 7, 1), (8, 256, 8)])
def test_on_a_cpu_it_is_the_usual_number_or_the_next_below_that_divides_the_batch(most, total, rows):
    assert usual_rows(most, total) == rows and total % rows == 0
