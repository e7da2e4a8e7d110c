"""The rows of one evaluation, kept or summed up."""

import numpy as np
import pytest

from peft_calib.trainer_callbacks.stream import RowStream


def test_a_batch_that_is_refused_counts_no_kept_row_twice():
    stream = RowStream(num_bins=15, max_rows=10)
    logits = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    labels = np.zeros(8, np.int64)
    stream.add(logits, labels)
    with pytest.raises(ValueError, match="labels must lie in"):
        stream.add(logits, labels + 7)  # more than are kept, so the kept rows are summed up first
    stream.add(logits, labels)
    assert len(stream) == 16
