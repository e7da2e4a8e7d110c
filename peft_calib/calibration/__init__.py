"""Measuring calibration: numbers with intervals and noise floors, from probabilities and labels alone.

Nothing here knows about adapters.
"""

from .answers import log_probabilities
from .decide import (
    ConformalSets,
    GroupsReached,
    NoGuaranteeError,
    SelectiveThreshold,
    decision_html,
    load_decision,
    reach_diagram,
    reached_by_group,
    set_size_diagram,
    threshold_diagram,
)
from .entities import Entities, EntitiesReport, entities_report, find_entities
from .labels import LabelScaling, LabelsReport, LabelThresholds, labels_report
from .numbers import ConformalInterval, GaussianNoise, NumbersReport, crps, numbers_report
from .recalibrate import (
    BetaCalibration,
    HistogramCalibration,
    IsotonicCalibration,
    MatrixScaling,
    PriorCorrection,
    PriorEstimate,
    TemperatureFit,
    TemperatureScaling,
    VectorScaling,
    estimate_prior,
)
from .report.classes import ClassRow
from .report.confidence import ConfidenceReport, confidence_report
from .report.conventions import CONVENTIONS
from .report.forest import group_diagram
from .report.groups import GroupPanel, GroupsRecord
from .report.plots import (
    before_after_diagram,
    classwise_diagram,
    confidence_histogram,
    reliability_diagram,
    risk_coverage_diagram,
)
from .report.report import CalibrationReport, calibration_report
from .resampling.comparison import Comparison, compare, compare_many
from .resampling.groups import compare_groups, pool_comparisons
from .scores.uncertainty import DrawUncertainty, draw_uncertainty
from .streaming.accumulator import CalibrationAccumulator
from .texts import (
    AnswerCalibration,
    AnswerScores,
    SampleSetReport,
    SampleSets,
    answer_scores,
    answers_match,
    normalise_answer,
    rouge_l,
)
from .watch import Watch, WatchReport, prometheus

__all__ = [
    "AnswerCalibration",
    "AnswerScores",
    "BetaCalibration",
    "CONVENTIONS",
    "CalibrationAccumulator",
    "CalibrationReport",
    "ClassRow",
    "Comparison",
    "ConfidenceReport",
    "ConformalInterval",
    "ConformalSets",
    "DrawUncertainty",
    "Entities",
    "EntitiesReport",
    "GaussianNoise",
    "GroupPanel",
    "GroupsReached",
    "GroupsRecord",
    "HistogramCalibration",
    "IsotonicCalibration",
    "LabelScaling",
    "LabelThresholds",
    "LabelsReport",
    "MatrixScaling",
    "NoGuaranteeError",
    "NumbersReport",
    "PriorCorrection",
    "PriorEstimate",
    "SampleSetReport",
    "SampleSets",
    "SelectiveThreshold",
    "TemperatureFit",
    "TemperatureScaling",
    "VectorScaling",
    "Watch",
    "WatchReport",
    "answer_scores",
    "answers_match",
    "before_after_diagram",
    "calibration_report",
    "classwise_diagram",
    "compare",
    "compare_groups",
    "compare_many",
    "confidence_histogram",
    "confidence_report",
    "crps",
    "decision_html",
    "draw_uncertainty",
    "entities_report",
    "estimate_prior",
    "find_entities",
    "group_diagram",
    "labels_report",
    "load_decision",
    "log_probabilities",
    "normalise_answer",
    "numbers_report",
    "pool_comparisons",
    "prometheus",
    "reach_diagram",
    "reached_by_group",
    "reliability_diagram",
    "risk_coverage_diagram",
    "rouge_l",
    "set_size_diagram",
    "threshold_diagram",
]
