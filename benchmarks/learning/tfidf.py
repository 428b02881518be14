"""What needs no reward model: ``python benchmarks/learning/tfidf.py HH_FILE``: accuracy of TF-IDF
with a logistic regression on the study's pairs.

The floor of benchmarks/learning/learns_smollm2.py's reward models, on the same split (1,769 pairs
to learn from, 513 held out): the difference of the two replies' unit TF-IDF vectors (words that two
replies or more have), L2 penalty of strength 1 / C, as scikit-learn's TfidfVectorizer and
LogisticRegression do it. One line for each size of n-grams and C, with Wilson's 95% interval.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from learns_smollm2 import rows_of, smollm2_inputs

from training.trainer.reward_metrics import wilson

Pair = tuple[str, str]
"""The better reply and the other."""


def pairs(source: str) -> tuple[list[Pair], list[Pair]]:
    """To learn from, and held out: as the study splits them."""
    rows, unseen = smollm2_inputs.split(rows_of(source))
    made: tuple[list[Pair], list[Pair]] = [], []
    for place, row in rows:
        made[place in unseen].append((row.best, row.responses[row.scores.index(min(row.scores))]))
    return made


def words(text: str, longest: int) -> Iterator[str]:
    found = re.findall(r"\b\w\w+\b", text.lower())
    for size in range(1, longest + 1):
        yield from (" ".join(found[at : at + size]) for at in range(len(found) - size + 1))


def vectors(learn: list[Pair], longest: int) -> Callable[[list[Pair]], torch.Tensor]:
    """What gives (pairs, words) of pairs, the better reply's vector less the other's, by the words
    of ``learn``."""
    replies = [reply for pair in learn for reply in pair]
    having = Counter(word for reply in replies for word in dict.fromkeys(words(reply, longest)))
    number = {word: place for place, word in enumerate(word for word, count in having.items() if count > 1)}
    rarity = {word: math.log((1 + len(replies)) / (1 + having[word])) + 1 for word in number}

    def vector(reply: str) -> torch.Tensor:
        made = torch.zeros(len(number))
        for word, count in Counter(words(reply, longest)).items():
            if word in number:
                made[number[word]] = count * rarity[word]
        return torch.nn.functional.normalize(made, dim=0)

    return lambda rows: torch.stack([vector(better) - vector(other) for better, other in rows])


def fit(x: torch.Tensor, strength: float) -> torch.Tensor:
    """Weights (words,) of the regression without intercept: a pair and its mirror image say the
    same."""
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
        x, held = differences(learn), differences(unseen)
        for strength in (0.3, 1.0, 3.0):
            right = (held @ fit(x, strength)).sign().add(1).div(2).sum().item()
            low, high = wilson(right, len(unseen))
            print(f"n-grams to {longest}, C = {strength}: {right / len(unseen):.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
