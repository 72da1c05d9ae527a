"""The reference's way to slice a stream of tokens: each batch of B rows uses up B * T + 1 of them, the last of which is
never an input. Our rows use up T tokens each; the stream behind them, sliced anew, gives the reference's batches."""

import numpy as np

from nanochat_jax.data.row_store import RowSet


class ReferenceStride:
    """The stream behind `rows`, as rows of the reference for batches of B; a `loader.RowSource`."""

    def __init__(self, rows: RowSet, B: int):
        self.T = rows.T
        stream = np.concatenate([*(rows[i][:-1] for i in range(len(rows))), rows[len(rows) - 1][-1:]])
        stride = B * self.T + 1
        batches = stream[: len(stream) // stride * stride].reshape(-1, stride)
        self._rows = [batch[i * self.T : i * self.T + self.T + 1] for batch in batches for i in range(B)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._rows[index]

    def mask(self, index: int) -> None:
        return None
