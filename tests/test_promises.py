"""The tests that docs/promises.md names are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "docs" / "promises.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_a_promise_has_its_test(file, name):
    """Catches a test that was renamed or removed, and leaves its promise to nobody."""
    assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_there_are_promises():
    assert len(NAMED) > 25
