"""``python -m training.data.peek FILE ROWS [SETTINGS]``: can the first rows be trained on, and what
is dropped or cut of them?

SETTINGS: JSON of {"data": section data, "model": section model, "stages": {stage: [kind of row,
setting, length]}}. A file with at most ROWS rows is prepared in full, in a temporary folder. Prints
what the rows are, then one warning a line. Exit status 65 for bad data, 64 for a model that can't
take it, with one line on stderr.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from training.config.data import DataConfig, ModelConfig
from training.config.schema import build, usage
from training.data import formats
from training.data.rows import Row
from training.data.source import lines
from training.errors import ConfigError, DataError

EXIT_USAGE = 64
MOST_TEXT = 16 << 20
"""Characters of the rows that are inspected."""


def main(arguments: list[str]) -> int:
    ended = usage(arguments[:2] if len(arguments) == 3 else arguments, "training.data.peek", "SOURCE ROWS", __doc__)
    if ended is not None:
        return ended
    file, most, settings = arguments[0], int(arguments[1]), json.loads(arguments[2]) if len(arguments) > 2 else {}
    try:
        print("\n".join(inspect(file, most, settings)))
    except DataError as error:
        print(error, file=sys.stderr)
        return DataError.exit_code
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    return 0


def inspect(file: str, most: int, settings: dict) -> list[str]:
    """A line on the first rows, then a line for each thing that is dropped or cut. Raises DataError
    for bad data, ConfigError for a model that can't take it."""
    counts, rows = Counter(), []
    skip = settings.get("data", {}).get("skip_bad_rows", False)
    echoes, size = formats.Echoes(), 0
    for row in formats.iterate(file, "rlhf", counts, skip, most):
        rows.append(row)
        counts.update(formats.unusual(row, echoes))
        size += len(row.prompt) + sum(map(len, row.responses))
        if size > MOST_TEXT:
            break
    if not rows:
        raise DataError(f"{file}: no usable row{formats.because(counts)}")
    echoes.check(file)
    is_complete = size <= MOST_TEXT and next(itertools.islice(lines(file), most, None), None) is None
    warnings = formats.dropped(counts)
    if settings.get("model"):
        warnings = prepared(settings) if is_complete else [*warnings, *sampled(rows, settings)]
    return [f"{file}: {_sentence(counts, rows, is_complete)}", *warnings]


def _sentence(counts: Counter, rows: list[Row], is_complete: bool) -> str:
    unused, pairs = counts["rows"] - len(rows), sum(len(row.responses) > 1 for row in rows)
    clauses = [f"{unused:,} of them are not used"] * bool(unused) + [f"{pairs or 'none'} can be compared"] * (
        pairs < len(rows)
    )
    if names := [name.removeprefix("not read: ") for name in counts if name.startswith("not read: ")]:
        clauses.append(f"nothing reads {', '.join(names)}")
    which = (
        f"all {counts['rows']:,} rows" if is_complete else f"the first {counts['rows']:,} rows (a sample: more follow)"
    )
    return f"{which} can be read{''.join(f', {clause}' for clause in clauses)}"


def prepared(settings: dict) -> list[str]:
    """Warnings of the preparation on all rows, by the same code without its caches. Raises
    DataError and ConfigError as it does."""
    from training.data import cache, cuts, sorting

    with tempfile.TemporaryDirectory() as folder, sorting.Writer(Path(folder) / "data") as writer:
        read = sorting.from_source(build(DataConfig, settings["data"], "data"), writer)
        warnings = formats.dropped(read)
        for stage, (kind, _, _) in settings["stages"].items():
            if name := next((name for name in sorting.names(kind) if not writer.counts[name]), ""):
                raise DataError(sorting.without_rows(settings["data"]["source"], stage, name, read))
        tokenizer = _tokenizer(settings["model"], (row["prompt"] + row["response"] for row in writer.rows("sft.jsonl")))
        for stage, (kind, key, length) in settings["stages"].items():
            writer.flush()
            rows = cache.tokenise(
                list(formats.iterate(writer.temporary / sorting.names(kind)[0], kind, Counter())), kind, tokenizer
            )
            warnings.append(cuts.sentence(f"{stage}.{key}", length, cuts.count(rows, kind, length)))
    return [line for line in warnings if line]


def sampled(rows: list[Row], settings: dict) -> list[str]:
    """Warnings on what is cut of the first rows. The demo's model gets none: its vocabulary is
    trained on all rows."""
    if settings["model"]["checkpoint"] == "demo":
        return []
    from training.data import cache, cuts

    tokenizer, warnings = _tokenizer(settings["model"], ()), []
    for stage, (kind, key, length) in settings["stages"].items():
        tokens = cache.tokenise([row for row in rows if len(row.responses) >= formats.NEEDS[kind][0]], kind, tokenizer)
        warnings.append(cuts.sentence(f"{stage}.{key}", length, cuts.count(tokens, kind, length)))
    return [f"of the first {len(rows):,} usable rows: {line}" for line in warnings if line]


def _tokenizer(model: dict, texts):
    from training.data import demo_model, sorting
    from training.data.tokenizer import Tokenizer

    if model["checkpoint"] != "demo":
        return Tokenizer(model["checkpoint"])
    with tempfile.TemporaryDirectory() as folder:
        demo_model.write_tokenizer(
            Path(folder), itertools.islice(texts, sorting.TOKENIZER_ROWS), build(ModelConfig, model, "model")
        )
        return Tokenizer(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
