"""``python -m training.data.peek FILE ROWS [SETTINGS]``: can the first rows be trained on, and what
is dropped or cut of them?

SETTINGS: JSON of {"data": section data, "model": section model, "stages": {stage: [kind of row,
setting, length]}}. A file with at most ROWS rows is prepared in full, in a temporary folder. Prints
what the rows are, then a row as the model sees it, each line after two spaces, then one warning a
line. Exit status 65 for bad data, 64 for a model that can't take it, with one line on stderr.
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
from training.data.examples import sft_example
from training.data.rows import HH_TEXT, Row
from training.data.source import lines
from training.data.styles import Chat, Style
from training.data.template import of_checkpoint
from training.data.tokenised import RowTokenizer
from training.errors import ConfigError, DataError

EXIT_USAGE = 64
MOST_SHOWN = 1200
"""Characters of the row that is shown."""
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
    """A line on the first rows, lines with one of them, then a line for each thing that is dropped
    or cut. Raises DataError for bad data, ConfigError for a model that can't take it."""
    data = build(DataConfig, settings.get("data", {}), "data")
    model = settings.get("model")
    tokenizer = of_checkpoint(data, model["checkpoint"]) if model else None
    counts, rows = Counter(), []
    style, check = (tokenizer.style(), tokenizer.problems) if tokenizer else (_style(data, model), None)
    echoes, size = formats.Echoes(), 0
    for row in formats.iterate(file, "rlhf", counts, data.skip_bad_rows, most, style, check):
        rows.append(row)
        counts.update(formats.unusual(row, echoes))
        size += len(row.key) + sum(map(len, row.texts))
        if size > MOST_TEXT:
            break
    if not rows:
        raise DataError(f"{file}: no usable row{formats.because(counts)}")
    echoes.check(file)
    is_complete = size <= MOST_TEXT and next(itertools.islice(lines(file), most, None), None) is None
    warnings = formats.dropped(counts)
    if model:
        warnings = prepared(settings, tokenizer) if is_complete else [*warnings, *sampled(rows, settings, tokenizer)]
    first = f"{file}: {_sentence(counts, rows, is_complete)}"
    return [*([f"{first}; {_template(tokenizer)}", *_shown(rows[0], tokenizer)] if tokenizer else [first]), *warnings]


def _style(data: DataConfig, model: dict | None) -> Style:
    """The style of rows whose tokenizer can't be asked: the one that takes more."""
    return HH_TEXT if model or data.template == "hh" else Chat()


def _template(tokenizer: RowTokenizer) -> str:
    if tokenizer.name == "hh":
        return 'written as HH\'s dialogue text (data.template = "hh")'
    ends = ", ".join(tokenizer.tokenizer.token(number) for number in tokenizer.stop_ids)
    return f"written by the tokenizer's chat template; a reply ends with {ends}"


def _shown(row: Row, tokenizer: RowTokenizer) -> list[str]:
    """The row as the model sees it, what is learnt between [[ and ]], in a few lines."""
    (ids,) = tokenizer.tokenise([row], "sft" if row.responses else "rlhf")
    if not row.responses:
        text = tokenizer.tokenizer.text(ids.prompt)
    else:
        example, text, at = sft_example(ids, 1 << 30), "", 0
        for start, end in example.spans:
            text += tokenizer.tokenizer.text(example.tokens[at:start])
            text += f"[[{tokenizer.tokenizer.text(example.tokens[start:end])}]]"
            at = end
        text += tokenizer.tokenizer.text(example.tokens[at:])
    half = MOST_SHOWN // 2
    if len(text) > MOST_SHOWN:
        text = f"{text[:half]} (...) {text[-half:]}"
    shown = [line if len(line) <= 160 else f"{line[:157]}..." for line in text.splitlines()]
    about = "the first row; [[what is learnt]]:" if row.responses else "the first prompt:"
    return [f"  {line}" for line in [about, *shown]]


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


def prepared(settings: dict, tokenizer: RowTokenizer | None) -> list[str]:
    """Warnings of the preparation on all rows, by the same code without its caches. ``tokenizer``
    None: the demo's, trained on the rows. Raises DataError and ConfigError as it does."""
    from training.data import cuts, sorting

    data = build(DataConfig, settings["data"], "data")
    with tempfile.TemporaryDirectory() as folder, sorting.Writer(Path(folder) / "data") as writer:
        read = sorting.from_source(data, writer, *((tokenizer.style(), tokenizer.problems) if tokenizer else ()))
        warnings = formats.dropped(read)
        for stage, (kind, _, _) in settings["stages"].items():
            if name := next((name for name in sorting.names(kind) if not writer.counts[name]), ""):
                raise DataError(sorting.without_rows(settings["data"]["source"], stage, name, read))
        tokenizer = tokenizer or _demo_tokenizer(settings["model"], writer)
        for stage, (kind, key, length) in settings["stages"].items():
            writer.flush()
            file = writer.temporary / sorting.names(kind)[0]
            rows = list(formats.iterate(file, kind, Counter(), style=tokenizer.style()))
            counts = cuts.count(tokenizer.tokenise(rows, kind), kind, length)
            warnings.append(cuts.sentence(f"{stage}.{key}", length, counts))
    return [line for line in warnings if line]


def sampled(rows: list[Row], settings: dict, tokenizer: RowTokenizer | None) -> list[str]:
    """Warnings on what is cut of the first rows. The demo's model gets none: its vocabulary is
    trained on all rows."""
    if tokenizer is None:
        return []
    from training.data import cuts

    warnings = []
    for stage, (kind, key, length) in settings["stages"].items():
        usable = [row for row in rows if len(row.responses) >= formats.NEEDS[kind][0]]
        counts = cuts.count(tokenizer.tokenise(usable, kind), kind, length)
        warnings.append(cuts.sentence(f"{stage}.{key}", length, counts))
    return [f"of the first {len(rows):,} usable rows: {line}" for line in warnings if line]


def _demo_tokenizer(model: dict, writer) -> RowTokenizer:
    from training.data import demo_model, sorting
    from training.data.tokenised import TextTokenizer
    from training.data.tokenizer import Tokenizer

    texts = (row["prompt"] + row["response"] for row in writer.rows("sft.jsonl"))
    with tempfile.TemporaryDirectory() as folder:
        demo_model.write_tokenizer(
            Path(folder), itertools.islice(texts, sorting.TOKENIZER_ROWS), build(ModelConfig, model, "model")
        )
        return TextTokenizer(Tokenizer(folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
