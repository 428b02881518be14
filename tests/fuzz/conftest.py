"""``python -m pytest tests/fuzz -q -n 0`` ends with how many damaged inputs each fuzzer tried."""

from tests.fuzz.damage import COUNTS


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        terminalreporter.section("damaged inputs")
        for name, count in sorted(COUNTS.items()):
            terminalreporter.write_line(f"{count:7,}  {name}")
        terminalreporter.write_line(f"{sum(COUNTS.values()):7,}  together")
