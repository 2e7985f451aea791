"""Conversions killed at random moments; and the campaign finds fault with a converter that deserves it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.make_damaged import SOUND
from tests.kill_campaign import Campaign, Case, Report, conversions
from tests.models import save_llama

DATA = bytes(range(256))
# Files that are written into the destination itself, one after the other, as most tools do.
CARELESS = """
import pathlib, shutil, sys, time
target, resume = pathlib.Path(sys.argv[1]), sys.argv[2] == "True"
{clear}
target.mkdir(exist_ok=True)
for name in "abcdef":
    (target / name).write_bytes(bytes(range({last})))
    time.sleep(0.02)
"""


def careless(clear: str, last: str) -> Case:
    """A converter that writes in place; `last` is the expression for where its data ends."""

    def command(target: Path, resume: bool) -> Sequence[str]:
        return [sys.executable, "-c", CARELESS.format(clear=clear, last=last), str(target), str(resume)]

    return Case("careless", command, dict.fromkeys("abcdef", DATA))


def test_a_few_kills(tmp_path: Path) -> None:
    report = Campaign(conversions(SOUND / "hf", tmp_path)[1:2], tmp_path / "work", seed=1).run(4)
    assert report.kills in (4, 5) and not report.details  # the last trial may kill the resuming run, too


@pytest.mark.slow
def test_many_kills(tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf", shard="300KB")
    report = Campaign(conversions(hf, tmp_path), tmp_path / "work", seed=2).run(60)
    assert (report.details, len(report.cases)) == ([], 6)
    assert report.found["writing"] > 5


def found_in(case: Case, tmp_path: Path) -> Report:
    return Campaign([case], tmp_path / "work", seed=3).run(8)


def test_a_destination_that_is_written_in_place_is_found(tmp_path: Path) -> None:
    report = found_in(careless("", "256"), tmp_path)
    assert report.half_written and not report.failed_resumes and not report.other_bytes
    assert json.loads(json.dumps(report.to_dict()))["clean"] is False


def test_an_old_model_that_is_removed_first_is_found(tmp_path: Path) -> None:
    case = careless("shutil.rmtree(target); time.sleep(0.1)", "256")
    report = found_in(replace(case, old={"precious": b"old"}), tmp_path)
    assert report.losses and not report.clean


def test_a_resume_that_makes_other_bytes_is_found(tmp_path: Path) -> None:
    report = found_in(careless("", "256 - resume"), tmp_path)
    assert report.other_bytes and not report.failed_resumes


def test_a_resume_that_refuses_is_found(tmp_path: Path) -> None:
    report = found_in(careless("target.mkdir()", "256"), tmp_path)
    assert report.failed_resumes
