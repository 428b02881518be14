"""The accuracy of TF-IDF with a logistic regression on the study's pairs: ``python
benchmarks/learning/tfidf.py HH_FILE``.

This is the floor of benchmarks/learning/learns_smollm2.py's reward models, on the same split (1,769
pairs to learn from, 513 held out). The regression reads the difference of the two replies' unit
TF-IDF vectors (of words that two replies or more have), with an L2 penalty of strength 1 / C, like
scikit-learn's TfidfVectorizer and LogisticRegression. The script prints one line for each size of
n-grams and C, with Wilson's 95% interval.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.learning.smollm2_inputs import data_config, split
from training.trainer.reward_metrics import wilson

Pair = tuple[str, str]
"""The better reply and the other."""


def pairs(source: str) -> tuple[list[Pair], list[Pair]]:
    """The pairs to learn from and the held-out pairs, split as in the study."""
    rows, unseen = split(data_config(source))
    learn: list[Pair] = []
    heldout: list[Pair] = []
    for place, row in rows:
        pair = (row.best, row.responses[row.scores.index(min(row.scores))])
        (heldout if place in unseen else learn).append(pair)
    return learn, heldout


def ngrams(text: str, longest: int) -> Iterator[str]:
    """All n-grams of a text's words, of 1 to ``longest`` words."""
    tokens = re.findall(r"\b\w\w+\b", text.lower())
    for size in range(1, longest + 1):
        yield from (" ".join(tokens[at : at + size]) for at in range(len(tokens) - size + 1))


def vectors(learn: list[Pair], longest: int) -> Callable[[list[Pair]], torch.Tensor]:
    """A function from pairs to (pairs, n-grams): the better reply's vector minus the other's. The
    n-grams and their weights are those of ``learn``."""
    replies = [reply for pair in learn for reply in pair]
    document_counts = Counter(ngram for reply in replies for ngram in dict.fromkeys(ngrams(reply, longest)))
    vocabulary = [ngram for ngram, count in document_counts.items() if count > 1]
    index = {ngram: at for at, ngram in enumerate(vocabulary)}
    idf = {ngram: math.log((1 + len(replies)) / (1 + document_counts[ngram])) + 1 for ngram in vocabulary}

    def vector(reply: str) -> torch.Tensor:
        values = torch.zeros(len(vocabulary))
        for ngram, count in Counter(ngrams(reply, longest)).items():
            if ngram in index:
                values[index[ngram]] = count * idf[ngram]
        return torch.nn.functional.normalize(values, dim=0)

    return lambda rows: torch.stack([vector(better) - vector(other) for better, other in rows])


def fit(x: torch.Tensor, strength: float) -> torch.Tensor:
    """Weights (n-grams,) of the regression. It has no intercept: a pair and its mirror image state
    the same."""
    weights = torch.zeros(x.size(1), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = strength * torch.nn.functional.softplus(-x @ weights).sum() + weights.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Anthropic's harmless-base.test.jsonl.gz")
    learn, unseen = pairs(parser.parse_args().source)
    print(f"{len(learn)} pairs to learn from, {len(unseen)} held out")
    for longest in (1, 2):
        differences = vectors(learn, longest)
        x, heldout = differences(learn), differences(unseen)
        for strength in (0.3, 1.0, 3.0):
            right = (heldout @ fit(x, strength)).sign().add(1).div(2).sum().item()
            low, high = wilson(right, len(unseen))
            print(f"n-grams to {longest}, C = {strength}: {right / len(unseen):.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
