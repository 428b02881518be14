"""Every fault of tests/slurm/faults on a real Slurm. All selected ones are started side by side;
each test waits for its own."""

import pytest

from tests.slurm.chaos import PAGE, Chaos, table_span
from tests.slurm.faults import SCENARIOS

SLOW = (pytest.mark.slow, pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def chaos(request, slurm_installed):
    asked = [
        item
        for item in request.session.items
        if "chaos" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("skip")
    ]
    with Chaos([item.callspec.params["name"] for item in asked]) as running:
        yield running


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW) if scenario.slow else name for name, scenario in SCENARIOS.items()]
)
def test_nothing_is_lost_or_run_twice(name, chaos):
    row = chaos.rows[name].result()
    if row.kind == "skipped":
        pytest.skip(row.outcome)
    assert row.kind == "passed", row.outcome


def test_the_page_of_faults_shows_each_of_them():
    """``python -m tests.slurm.chaos --docs`` writes the table."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = table_span(text)
    shown = [line.split(" | ")[0].removeprefix("| ") for line in text[start:end].split("\n")[2:]]
    assert shown == [scenario.fault.replace("|", "\\|") for scenario in SCENARIOS.values()]
