"""After deployment: what unlabelled predictions say of a model, and an alarm that keeps its false-alarm rate."""

from .estimates import Expected
from .exposition import prometheus
from .report import Alarm, WatchReport
from .watch import Watch

__all__ = ["Alarm", "Expected", "Watch", "WatchReport", "prometheus"]
