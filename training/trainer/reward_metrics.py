"""How well rewards order held-out pairs: accuracy with its interval, margin, calibration, and how
much of it is length."""

from __future__ import annotations

import math

import torch

from training.distributed import groups

Z = 1.959964
"""Standard errors on each side of a 95% interval."""


def wilson(correct: float, total: float) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    z = Z
    centre = (correct + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(correct * (total - correct) / total + z * z / 4)
    return centre - half, centre + half


def mean_interval(count: float, total: float, squares: float) -> tuple[float, float]:
    """95% interval of a mean from ``count`` numbers' sum and sum of squares (normal approximation);
    NaN of one number.

    >>> [round(end, 3) for end in mean_interval(4, 12.0, 50.0)]
    [0.883, 5.117]
    """
    if count < 2:
        return math.nan, math.nan
    half = Z * math.sqrt(max(squares - total * total / count, 0.0) / (count - 1) / count)
    return total / count - half, total / count + half


CONFIDENCE = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Lower edges of the bins in which calibration is measured: the model's probability that the reply
it prefers is the better one."""


def calibration_sums(margin: torch.Tensor) -> torch.Tensor:
    """``margin`` (pairs,): reward of the better reply less that of the other -> (3, bins): pairs,
    those that the model orders rightly, and their summed confidence sigmoid(abs(margin)), by
    confidence. Sums, so that data-parallel ranks can add them up."""
    confidence, right = margin.abs().sigmoid(), (margin > 0).double()
    place = torch.bucketize(confidence, torch.tensor(CONFIDENCE[1:], dtype=confidence.dtype), right=True)
    bins = torch.nn.functional.one_hot(place, len(CONFIDENCE)).double()
    return torch.stack((bins.sum(0), right @ bins, confidence.double() @ bins))


def calibration(sums: torch.Tensor) -> dict[str, float]:
    """Accuracy at each confidence (bins without a pair are left out), and the expected calibration
    error (Guo et al. 2017, eq. 3): how far accuracy is from confidence, 0 at best.

    >>> calibration(calibration_sums(torch.tensor([2.2, 2.2, 2.2, -2.2])))  # 90% sure, 75% right
    {'heldout_calibration_error': 0.1502, 'heldout_accuracy_at_0.9': 0.75}
    """
    pairs, right, confidence = sums
    error = ((right - confidence).abs().sum() / pairs.sum()).item()
    metrics = {
        f"heldout_accuracy_at_{edge}": hit / count
        for edge, count, hit in zip(CONFIDENCE, pairs.tolist(), right.tolist(), strict=True)
        if count
    }
    return {"heldout_calibration_error": round(error, 4), **metrics}


def length_bias(sums: torch.Tensor) -> dict[str, float]:
    """``length_sums`` over all ranks -> Pearson's correlation of reward with length over all
    replies, and the accuracy on the pairs whose better reply is the shorter and the longer one
    (left out where there is none): a model that reads the length alone has 1 and 0."""
    count, reward, length, rewards, lengths, products, shorter, shorter_right, longer, longer_right = sums.tolist()
    spread = (count * rewards - reward**2) * (count * lengths - length**2)
    metrics = {
        "heldout_length_correlation": (count * products - reward * length) / math.sqrt(spread) if spread > 0 else 0.0
    }
    for name, pairs, right in (("shorter", shorter, shorter_right), ("longer", longer, longer_right)):
        if pairs:
            metrics[f"heldout_accuracy_{name}"] = right / pairs
    return metrics


def length_sums(rewards: torch.Tensor, scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(10,) sums for ``length_bias`` from (Q, K) tensors: of replies: number, r, l, r^2, l^2, r l;
    of pairs whose better reply is shorter, then longer: number, rightly ordered ones. A score of
    NaN is no reply."""
    real = ~scores.isnan()
    r, l = rewards[real].double(), lengths[real].double()  # noqa: E741
    better = scores[:, :, None] > scores[:, None, :]
    right = rewards[:, :, None] > rewards[:, None, :]
    sides = (better & (lengths[:, :, None] < lengths[:, None, :]), better & (lengths[:, :, None] > lengths[:, None, :]))
    counts = [number.sum().double() for side in sides for number in (side, side & right)]
    return torch.stack(
        [torch.tensor(float(len(r)), dtype=torch.double), r.sum(), l.sum(), r @ r, l @ l, r @ l, *counts]
    )


def judged(rewards: torch.Tensor, scores: torch.Tensor, lengths: torch.Tensor) -> dict[str, float]:
    """This data-parallel rank's rewards, scores and replies' lengths in tokens, each (Q, K) -> over
    all ranks' pairs: accuracy and mean margin with their 95% intervals, calibration, the accuracy
    of "the shorter reply wins", and ``length_bias``. A collective."""
    pair = scores[:, :, None] > scores[:, None, :]
    margin = (rewards[:, :, None] - rewards[:, None, :])[pair].double()
    shorter = (lengths[:, :, None] < lengths[:, None, :])[pair]
    sums = torch.stack(
        (pair.sum().double(), (margin > 0).sum().double(), margin.sum(), margin.square().sum(), shorter.sum().double())
    )
    total, correct, margins, squares, shorter = groups.sum_over_data(sums.to(groups.device())).tolist()
    bins = groups.sum_over_data(calibration_sums(margin).to(groups.device())).cpu()
    low, high = wilson(correct, total)
    margin_low, margin_high = mean_interval(total, margins, squares)
    by_length = groups.sum_over_data(length_sums(rewards, scores, lengths).to(groups.device())).cpu()
    return {
        "heldout_accuracy": correct / total,
        "heldout_accuracy_low": low,
        "heldout_accuracy_high": high,
        "heldout_margin": margins / total,
        "heldout_margin_low": margin_low,
        "heldout_margin_high": margin_high,
        "shorter_wins": shorter / total,
        **calibration(bins),
        **length_bias(by_length),
    }
