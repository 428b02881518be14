"""``python -m training.data.peek FILE ROWS [--skip-bad-rows]``: can the first rows be trained on? Standard library only.

Prints what they are; exit status 65 for bad data, with one line on stderr that names file, line and field.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter

from training.data import formats


def main(arguments: list[str]) -> int:
    source, number, *options = arguments
    counts: Counter = Counter()
    echoes = formats.Echoes()
    try:
        rows = list(itertools.islice(formats.iterate(source, "rlhf", counts, "--skip-bad-rows" in options), int(number)))
        if not rows:
            raise formats.DataError(f"{source}: no usable row{formats.because(counts)}")
        for row in rows:
            echoes.add(row)
        echoes.check(source)
    except formats.DataError as error:
        print(error, file=sys.stderr)
        return formats.DataError.exit_code
    dropped, pairs = counts["rows"] - len(rows), sum(len(row.responses) > 1 for row in rows)
    words = [f"{dropped} of them are not used"] * bool(dropped) + [f"{pairs or 'none'} can be compared"] * (pairs < len(rows))
    if names := [name.removeprefix("not read: ") for name in counts if name.startswith("not read: ")]:
        words.append(f"nothing reads {', '.join(names)}")
    print(f"{source}: the first {counts['rows']} rows can be read{''.join(f', {word}' for word in words)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
