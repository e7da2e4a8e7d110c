"""A report of a watch as Prometheus reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .report import WatchReport

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_OWN = ("assumption", "bound", "signal")


def prometheus(report: WatchReport, *, prefix: str = "peft_calib", labels: Mapping[str, str] | None = None) -> str:
    """Render a report in the text format of Prometheus (0.0.4), for a `/metrics` page or a textfile collector.

    Args:
        report: Of `Watch.report()` or `Watch.update(...)`.
        prefix: What the names begin with.
        labels: Put on every line, such as `{"adapter": "reviews"}`.

    Returns:
        Lines with their `# HELP` and `# TYPE`, the last one ended; an estimate that cannot be had has no line.

    Raises:
        ValueError: For a prefix or a name of a label that Prometheus does not take, or one used here.

    Example:
        >>> import numpy as np
        >>> from peft_calib.calibration import Watch
        >>> rng = np.random.default_rng(0)
        >>> p = rng.uniform(0.5, 1.0, 500)
        >>> watch = Watch().start(p, (rng.random(500) < p).astype(int))
        >>> print(prometheus(watch.report(), labels={"adapter": "a"}).splitlines()[2])
        peft_calib_watch_rows_total{adapter="a"} 0
    """
    common = dict(labels or {})
    for name in common:
        if not _LABEL.fullmatch(name) or name in _OWN:
            raise ValueError(
                f"{name!r} cannot be the name of a label: letters, digits and _, and not {', '.join(_OWN)}."
            )
    if not _NAME.fullmatch(prefix):
        raise ValueError(f"`prefix` must be letters, digits, _ and :, not a digit first, got {prefix!r}.")
    lines: list[str] = []
    for name, kind, told, samples in _families(report):
        lines += [f"# HELP {prefix}_watch_{name} {told}", f"# TYPE {prefix}_watch_{name} {kind}"]
        lines += [f"{prefix}_watch_{name}{_labels({**common, **own})} {value!r}" for own, value in samples]
    return "\n".join(lines) + "\n"


Samples = list[tuple[dict[str, str], float | int]]


def _families(report: WatchReport) -> Iterator[tuple[str, str, str, Samples]]:
    """Name, kind, help and samples of every metric."""
    yield "rows_total", "counter", "Unlabelled rows since the start.", [({}, report.rows)]
    yield "window_rows", "gauge", "Newest rows, which the estimates are of.", [({}, report.window_rows)]
    of_reference = {"value": report.reference_accuracy, "low": report.reference_interval[0]}
    of_reference["high"] = report.reference_interval[1]
    samples: Samples = [({"bound": bound}, value) for bound, value in of_reference.items()]
    yield "reference_accuracy", "gauge", "Accuracy of the labelled reference rows.", samples
    accuracy: Samples = []
    surer: Samples = []
    for one in report.expected:
        accuracy += _with_bounds(one.name, one.accuracy, one.interval)
        surer += _with_bounds(one.name, one.overconfidence, one.overconfidence_interval)
    yield "expected_accuracy", "gauge", "Accuracy to be expected of the window under an assumption.", accuracy
    yield "expected_overconfidence", "gauge", "Mean confidence less accuracy, likewise.", surer
    needed: Samples = [({"signal": one.signal}, one.evidence) for one in report.alarms]
    yield "evidence", "gauge", "Logarithm of the wealth of bets against no change.", needed
    needed = [({"signal": one.signal}, one.needed) for one in report.alarms]
    yield "evidence_needed", "gauge", "Evidence at which there is an alarm.", needed
    raised: Samples = [({"signal": one.signal}, int(one.raised_at is not None)) for one in report.alarms]
    yield "alarm", "gauge", "1 from the alarm on that a distribution has changed.", raised
    yield (
        "false_alarm_probability",
        "gauge",
        "Highest probability of any false alarm, ever.",
        [({}, report.false_alarm)],
    )


def _with_bounds(name: str, value: float | None, interval: tuple[float, float] | None) -> Samples:
    if value is None or interval is None:
        return []
    bounds = {"value": value, "low": interval[0], "high": interval[1]}
    return [({"assumption": name, "bound": bound}, number) for bound, number in bounds.items()]


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
