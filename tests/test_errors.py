"""One line for an error that names its remedy, a traceback for a bug."""

import pytest

import tasks
from nanochat_jax import checkpoint, cli, models
from nanochat_jax.errors import is_ours


def raised(call) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def test_what_a_raise_of_ours_says_needs_no_traceback():
    assert is_ours(raised(lambda: checkpoint.run_dir("../x")))
    assert is_ours(raised(lambda: tasks.load("no such task", "train")))
    assert is_ours(raised(lambda: open("no such file")))


def test_a_slip_in_our_own_line_and_a_librarys_error_are_shown_whole():
    slip = raised(lambda: cli.parse(int, ["x"]))  # pyright: ignore[reportArgumentType] - no dataclass
    assert not is_ours(slip)
    assert not is_ours(raised(lambda: int("x")))
    assert not is_ours(raised(lambda: checkpoint.config_from_dict(3)))  # pyright: ignore[reportArgumentType]


def test_models_names_what_is_wrong_with_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "set")
    assert models.main(["--run=../x"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_flags_that_a_stage_has_no_use_for_are_named():
    from nanochat_jax.stages import launch, rl

    given = rl.RlSettings(max_seq_len=64, eval_tokens=5, slots=8)
    assert launch.unused("rl", given) == ["--max_seq_len", "--eval_tokens"]
    assert launch.unused("rl", rl.DemoRlSettings()) == [] == launch.unused("sft", given)
