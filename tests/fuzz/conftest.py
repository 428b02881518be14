"""``python -m pytest tests/fuzz -q -n 0`` ends with how often each fuzzer tried a damaged input: a
folder counts once for each reader."""

from tests.fuzz.damage import COUNTS


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        terminalreporter.section("tries of damaged inputs, a folder once by each of its readers")
        for name, count in sorted(COUNTS.items()):
            terminalreporter.write_line(f"{count:7,}  {name}")
        terminalreporter.write_line(f"{sum(COUNTS.values()):7,}  together")
