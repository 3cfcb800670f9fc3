"""What operators see of a round: the means of what its devices told."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spafl.protocol import Metrics


@dataclass(frozen=True, slots=True)
class Report:
    """A counted update without its bytes: the SHA-256 of what was sent, and its metrics."""

    digest: str
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Summary:
    """Means weighted by examples over the devices that told a figure; None or () if none did."""

    loss: float | None = None
    accuracy: float | None = None
    density: tuple[float, ...] = ()


def summarise(reports: Mapping[str, Report]) -> Summary:
    """Returns the summary of `reports` (device -> report), whatever their order."""
    metrics = [report.metrics for report in reports.values()]
    layers = zip(*([(told, m.examples) for told in m.density] for m in metrics if m.density), strict=True)
    return Summary(
        loss=_mean((m.loss, m.examples) for m in metrics if m.loss is not None),
        accuracy=_mean((m.accuracy, m.examples) for m in metrics if m.accuracy is not None),
        density=tuple(_mean(layer) or 0.0 for layer in layers),
    )


def _mean(figures: Iterable[tuple[float, int]]) -> float | None:
    pairs = list(figures)
    # fsum is exact before its one rounding, so the order of arrival cannot show
    total = math.fsum(weight for _, weight in pairs)
    return math.fsum(figure * weight for figure, weight in pairs) / total if pairs else None
