"""What needs no reward model: ``python benchmarks/tfidf.py HH_FILE``: accuracy of TF-IDF with a logistic regression on the study's pairs.

The floor of benchmarks/learns_smollm2.py's reward models, on the same split (1,769 pairs to learn from, 513 held out): the difference of
the two replies' unit TF-IDF vectors (words that two replies or more have), L2 penalty of strength 1 / C, as scikit-learn's
TfidfVectorizer and LogisticRegression do it. One line for each size of n-grams and C, with Wilson's 95% interval.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator

import torch
from learns_smollm2 import HELDOUT, HELDOUT_MAX

from training.data import formats
from training.data.config import DataConfig
from training.data.split import HeldOut
from training.ranking import wilson

Pair = tuple[str, str]
"""The better reply and the other."""


def pairs(source: str) -> tuple[list[Pair], list[Pair]]:
    """To learn from, and held out: by prompt, as the study splits them."""
    heldout = HeldOut(DataConfig(source=source, heldout=HELDOUT, heldout_max=HELDOUT_MAX))
    rows = list(formats.iterate(source, "reward", Counter()))
    for row in rows:
        heldout.add(heldout.place(row.prompt))
    unseen = heldout.chosen()
    made: tuple[list[Pair], list[Pair]] = [], []
    for row in rows:
        better, other = (text for _, text in sorted(zip(row.scores, row.responses, strict=True), reverse=True))
        made[heldout.place(row.prompt) in unseen].append((better, other))
    return made


def words(text: str, longest: int) -> Iterator[str]:
    found = re.findall(r"\b\w\w+\b", text.lower())
    for size in range(1, longest + 1):
        yield from (" ".join(found[at : at + size]) for at in range(len(found) - size + 1))


def differences(learn: list[Pair], rows: list[Pair], longest: int) -> torch.Tensor:
    """(pairs, words): the better reply's vector less the other's."""
    replies = [reply for pair in learn for reply in pair]
    having = Counter(word for reply in replies for word in set(words(reply, longest)))
    number = {word: place for place, word in enumerate(word for word, count in having.items() if count > 1)}
    rarity = {word: math.log((1 + len(replies)) / (1 + having[word])) + 1 for word in number}

    def vector(reply: str) -> torch.Tensor:
        made = torch.zeros(len(number))
        for word, count in Counter(words(reply, longest)).items():
            if word in number:
                made[number[word]] = count * rarity[word]
        return torch.nn.functional.normalize(made, dim=0)

    return torch.stack([vector(better) - vector(other) for better, other in rows])


def fit(x: torch.Tensor, strength: float) -> torch.Tensor:
    """Weights (words,) of the regression without intercept: a pair and its mirror image say the same."""
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
        x, held = differences(learn, learn, longest), differences(learn, unseen, longest)
        for strength in (0.3, 1.0, 3.0):
            right = (held @ fit(x, strength)).sign().add(1).div(2).sum().item()
            low, high = wilson(right, len(unseen))
            print(f"n-grams to {longest}, C = {strength}: {right / len(unseen):.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
