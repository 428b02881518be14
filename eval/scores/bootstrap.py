"""Bootstrap confidence intervals over independent units (questions or prompts); pure, NumPy in and
out.

Percentile bootstrap (Efron & Tibshirani 1993, ch. 13). A unit brings the sum and the number of its
observations, so that the two ratings of one question are always resampled together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% confidence interval; ``units`` is the number of questions or prompts
    behind it."""

    mean: float
    low: float
    high: float
    units: int

    def as_dict(self) -> dict:
        return asdict(self)


def _resampled(sums: np.ndarray, counts: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(units,), (units,), (resamples, units) -> (resamples,) pooled means; nan where a resample
    holds no observation."""
    total = counts[draws].sum(axis=1)
    return np.divide(sums[draws].sum(axis=1), total, out=np.full(len(draws), np.nan), where=total > 0)


def _draws(units: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, units, size=(RESAMPLES, units))


def _interval(mean: float, resampled: np.ndarray, units: int) -> Interval:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Interval(float(mean), float(low), float(high), units)


def pooled_mean(sums, counts, seed: int) -> Interval:
    """Mean over all observations of all units; ``sums`` and ``counts`` are (units,). Raises
    ValueError without observations."""
    sums, counts = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    if counts.sum() == 0:
        raise ValueError("pooled_mean: no observations")
    return _interval(sums.sum() / counts.sum(), _resampled(sums, counts, _draws(len(sums), seed)), len(sums))


def mean(values, seed: int) -> Interval:
    """Mean of one value a unit."""
    return pooled_mean(values, np.ones(len(values)), seed)


def paired_difference(sums, counts, base_sums, base_counts, seed: int) -> Interval:
    """Pooled mean minus the base's over the same units, both drawn together; all four are
    (units,)."""
    sums, counts, base_sums, base_counts = (np.asarray(a, dtype=float) for a in (sums, counts, base_sums, base_counts))
    if counts.sum() == 0 or base_counts.sum() == 0:
        raise ValueError("paired_difference: no observations")
    draws = _draws(len(sums), seed)
    resampled = _resampled(sums, counts, draws) - _resampled(base_sums, base_counts, draws)
    return _interval(sums.sum() / counts.sum() - base_sums.sum() / base_counts.sum(), resampled, len(sums))
