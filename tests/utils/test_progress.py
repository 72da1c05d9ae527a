import pytest

from nanochat_jax.utils.progress import duration, time_left


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"), (5.31, "5.3s"), (9.94, "9.9s"), (9.96, "10s"), (42.4, "42s"), (59.6, "1m00s"), (184, "3m04s"),
        (3599.6, "1h00m"), (3725, "1h02m"), (90_000, "25h00m"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_what_is_left_is_an_estimate_in_whole_seconds():
    assert [time_left(s) for s in (0.2, 5.31, 9.96, 184, 3725)] == ["0s", "5s", "10s", "3m04s", "1h02m"]
