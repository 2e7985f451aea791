"""The Makefile's targets name files that exist: a folder that moved must not empty a target."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def missing(text: str) -> list[str]:
    """The test files and folders that a Makefile names and that are not there."""
    return [path for path in re.findall(r"(?<![\w/.-])tests/[\w./-]+", text) if not (ROOT / path).exists()]


def test_the_files_that_targets_name_exist():
    text = (ROOT / "Makefile").read_text()
    assert "tests/verification" in text
    assert missing(text) == []


def test_a_file_that_moved_is_noticed():
    assert missing("NUMERIC := tests/verification tests/gone.py\n") == ["tests/gone.py"]
