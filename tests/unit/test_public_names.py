"""What `import parity` offers: each name is what it says, whatever else is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

import parity
from tests.conftest import ROOT, environment


@pytest.mark.parametrize("first", ["import parity.record", "pass"])
def test_record_is_the_function(first: str) -> None:
    code = f"{first}\nimport parity, inspect\nfrom parity import record\nassert inspect.isfunction(parity.record)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_all_that_is_offered_is_there() -> None:
    assert set(parity.__all__) == {"Comparison", "diff", "open_dump", "record", "recording", "tap", "with_taps"}
    assert parity.__version__.count(".") == 2
    assert parity.Comparison.__name__ == "Comparison"
    assert callable(parity.open_dump)
    with pytest.raises(AttributeError, match="no attribute 'dif'"):
        _ = parity.dif


def test_types_are_told_to_a_type_checker() -> None:
    assert (ROOT / "parity" / "py.typed").is_file()
