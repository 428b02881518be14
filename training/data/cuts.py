"""How many rows a trainer's length cuts, and the sentences that say so.

``python -m training.data.cuts DATA STAGES`` prints a line for each thing that is dropped or cut
from the prepared folder DATA, whose caches are there. STAGES: JSON of {stage: [kind of row, key of
the length, length]}."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from training.config.schema import usage
from training.data import formats
from training.data.cache import TokenRows
from training.data.examples import comparison_example, sft_example
from training.data.tokenised import Tokenised, lengths

MOST_LOOKED = 20_000
"""Most rows beyond the length whose replies are compared after the cut; of more rows, an evenly
spread sample."""


def count(rows: Sequence[Tokenised], kind: str, length: int) -> dict[str, int]:
    """{"rows", "longer": than ``length``, "looked": longer ones whose replies were looked at,
    "unended": of them, those where a reply loses its end, "alike": of them, comparisons whose
    replies are the same after the cut}."""
    if isinstance(rows, TokenRows):
        longer = rows.longer(length).tolist()
    else:
        longer = [index for index, row in enumerate(rows) if lengths(row) > length]
    looked = longer[:: -(-len(longer) // MOST_LOOKED)] if longer and kind != "rlhf" else []
    unended = alike = 0
    for index in looked:
        row = rows[index]
        if kind == "reward":
            examples = [example for example, _ in comparison_example(row, length)]
            alike += all(example.tokens == examples[0].tokens for example in examples)
        else:
            examples = [sft_example(row, length)]
        unended += not all(example.complete for example in examples)
    return {"rows": len(rows), "longer": len(longer), "looked": len(looked), "unended": unended, "alike": alike}


def sentence(name: str, length: int, counts: dict[str, int]) -> str:
    """One sentence; "" where nothing is cut. ``name``: the setting, e.g. "sft.seq_length"."""
    if not counts["longer"]:
        return ""
    rows, longer = counts["rows"], counts["longer"]
    every = "all" if longer == rows else f"{longer:,} of"
    parts = [f"{every} {rows:,} rows are longer than {name} = {length:,} and are cut"]
    about = "" if counts["looked"] == longer else f" of {counts['looked']:,} looked at"
    if counts["unended"]:
        parts.append(f"{counts['unended']:,}{about} lose the end of a reply")
    if counts["alike"]:
        parts.append(
            f"the replies of {counts['alike']:,}{about} are then the same, so that nothing is learnt from them"
        )
    return ", ".join(parts)


def lines(folder: Path, stages: dict[str, tuple[str, str, int]]) -> list[str]:
    """Lines on the rows of a prepared folder that were dropped, and on those that the stages
    cut."""
    notes = formats.dropped(json.loads((folder / "counts.json").read_text(encoding="utf-8"))["read"])
    for stage, (kind, key, length) in stages.items():
        caches = list((folder / f"{kind}.jsonl.tokens").glob("*/about.json"))
        caches.sort(key=lambda path: path.stat().st_mtime_ns)
        if caches:
            notes.append(sentence(f"{stage}.{key}", length, count(TokenRows(caches[-1].parent), kind, length)))
    return [line for line in notes if line]


def main(arguments: list[str]) -> int:
    ended = usage(arguments, "training.data.cuts", "DATA STAGES", __doc__)
    if ended is None:
        for line in lines(Path(arguments[0]), json.loads(arguments[1])):
            print(line)
    return ended or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
