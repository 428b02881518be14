"""What several benchmarks share: their output, one JSON object a line."""

from __future__ import annotations

import json

missed = []


def say(ok: bool | None = None, **values) -> None:
    """One JSON line; ``ok`` says whether a tolerance was met."""
    values = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}
    print(json.dumps(values if ok is None else {**values, "ok": ok}), flush=True)
    if ok is False:
        missed.append(values)
