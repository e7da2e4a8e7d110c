"""Callbacks for the stock Trainer: thin shells over the rest of the package."""

from .best import BestCalibrationCallback
from .calibration import CalibrationCallback
from .checkpoints import CheckpointGuardCallback, ConsolidatedAdapterCallback, last_complete_checkpoint
from .loss import RegularizedLossMixin
from .preprocess import preprocess_logits_for_calibration
from .recalibration import RecalibrationCallback, load_recalibration
from .schedule import RegularizerScheduleCallback
from .spread import PosteriorSpreadCallback, posterior_spread
from .trunk import TrunkCacheCallback

__all__ = [
    "BestCalibrationCallback",
    "CalibrationCallback",
    "CheckpointGuardCallback",
    "ConsolidatedAdapterCallback",
    "PosteriorSpreadCallback",
    "RecalibrationCallback",
    "RegularizedLossMixin",
    "RegularizerScheduleCallback",
    "TrunkCacheCallback",
    "last_complete_checkpoint",
    "load_recalibration",
    "posterior_spread",
    "preprocess_logits_for_calibration",
]
