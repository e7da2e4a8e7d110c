"""Which rows an adapter has seen; see `peft_calib.provenance.splits`."""

from .provenance.splits import (
    SPLIT_FILE,
    RowSet,
    SplitRecord,
    calibration_split,
    check_unseen,
    read_split,
    record_split,
)

__all__ = ["SPLIT_FILE", "RowSet", "SplitRecord", "calibration_split", "check_unseen", "read_split", "record_split"]
