"""--device_batch_size=auto on a CPU."""

import pytest

from nanochat_jax.stages.batch_size import usual_rows


@pytest.mark.parametrize("most, total, rows", [(32, 8, 8), (32, 64, 32), (32, 12, 4), (16, 7, 1), (8, 256, 8)])
def test_the_usual_number_or_the_next_below_that_divides_the_batch(most, total, rows):
    assert usual_rows(most, total) == rows and total % rows == 0
