"""`python -m tests.slow DURATIONS...`: write tests/slow.txt, the tests that took longer than LIMIT seconds.

DURATIONS are what `pytest -vv --durations=0` printed. A test marked `slow` in its own file needs no line here.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

LIMIT = 0.15  # seconds; what is below it takes less than 90 s together, on two free cores
TABLE = Path(__file__).parent / "slow.txt"
LINE = re.compile(r"^([\d.]+)s (?:call|setup|teardown) +(\S.*)$", re.MULTILINE)


def measured(texts: list[str]) -> list[str]:
    """The ids of the tests that took longer than LIMIT, sorted; what pytest printed is read."""
    seconds: Counter[str] = Counter()
    for text in texts:
        for took, test in LINE.findall(text):
            seconds[test.strip()] += float(took)
    return sorted(test for test, took in seconds.items() if took > LIMIT)


if __name__ == "__main__":
    TABLE.write_text("".join(f"{test}\n" for test in measured([Path(name).read_text() for name in sys.argv[1:]])))
