"""Numbers with a Gaussian around each: their noise, their scores, and intervals that hold."""

from .gaussian import crps
from .interval import ConformalInterval
from .noise import GaussianNoise
from .report import NumbersReport, numbers_report

__all__ = ["ConformalInterval", "GaussianNoise", "NumbersReport", "crps", "numbers_report"]
