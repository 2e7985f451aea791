"""ckpt-chaos kills conversions at every file event, resumes them, and compares with an undisturbed run.

Its modes: `before` (dies before the event), `torn` (the file is cut in half), `term` (SIGTERM, then a kill),
`unsynced` (dies, and whatever was not synced is lost). What it compares is everything that lies around the
destination, so that a partial directory or lock left over counts as a difference.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from tests.models import files_of, save_llama

ROOT = Path(__file__).resolve().parent.parent
MODES = ("before", "torn", "term", "unsynced")
EVERYTHING = 10_000
HASHES = "sh -c 'cd {out} && find . -print0 | sort -z && find . -type f -print0 | sort -z | xargs -0 sha256sum'"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("hf") / "model")


def conversion(source: Path, *options: str) -> str:
    """The shell command of a conversion into {out}/model; one thread, so that events have an order."""
    command = [sys.executable, "-m", "tests.visible_writes", "convert", str(source)]
    arguments = " ".join(("--to", "torch", "--tp", "2", "--threads", "1", *options))
    return f"mkdir -p {{out}} && exec {shlex.join(command)} {{out}}/model {arguments}"


def chaos(
    source: Path, work: Path, modes: tuple[str, ...], points: int, **environment: str
) -> tuple[int, list[dict[str, Any]]]:
    """Runs ckpt-chaos; its exit code, and what it found at each point (the undisturbed run is the first)."""
    resume = shlex.join(["sh", "-c", conversion(source, "--resume")])
    harness = [sys.executable, "-m", "ckpt_chaos", "run", "--work", str(work), "--modes", ",".join(modes)]
    harness += ["--max-points", str(points), "--jobs", "2", "--result-cmd", HASHES, "--resume-cmd", resume]
    harness += ["--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL"]
    process = subprocess.run(
        [*harness, "--", "sh", "-c", conversion(source)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    results = [json.loads(path.read_text()) for path in sorted(work.glob("pt_*/result.json"))]
    assert results, process.stdout + process.stderr
    return process.returncode, sorted(results, key=lambda result: result["order"])


def assert_survived(code: int, results: list[dict[str, Any]]) -> None:
    """Most points were reached, and every resume gave the files of the undisturbed run."""
    bad = [r for r in results if r["outcome"]["raised"] or r["outcome"]["weights_diff"] != 0]
    assert (code, bad) == (0, [])
    # Threads write and sync the files: what happens at a point, and on a busy machine how many points there are, may
    # not be as in the undisturbed run. A SIGTERM that arrives with the last file in place finds nothing left to stop.
    missed = [r for r in results[1:] if r["drift"] or not (r["crashed"] or r["point"][1] == "term")]
    assert 4 * len(missed) <= len(results)


def test_some_of_every_mode(source: Path, tmp_path: Path) -> None:
    code, results = chaos(source, tmp_path / "work", MODES, points=8)
    assert_survived(code, results)
    assert Counter(result["point"][1] for result in results[1:]) == dict.fromkeys(MODES, 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_event(source: Path, tmp_path: Path, mode: str) -> None:
    code, results = chaos(source, tmp_path / "work", (mode,), points=EVERYTHING)
    assert_survived(code, results)
    assert len(results) > (10 if mode == "torn" else 20)


@pytest.mark.slow
def test_a_conversion_that_never_syncs_is_found_out(source: Path, tmp_path: Path) -> None:
    code, results = chaos(source, tmp_path / "work", ("unsynced",), points=EVERYTHING, CHAOS_NO_SYNC="1")
    bad = [r for r in results if r["outcome"]["raised"] or r["outcome"]["weights_diff"] != 0]
    assert code == 1 and bad


def run(source: Path, target: Path, *options: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptkit", "convert", str(source), str(target), "--to", "torch", *options]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "CKPTKIT_FAULT": fault}, capture_output=True, text=True)


@pytest.mark.parametrize("old", [False, True])
def test_killed_after_the_commit_only_cleans_up(source: Path, tmp_path: Path, old: bool) -> None:
    target, options = tmp_path / "meg", ["--tp", "2", *(["--overwrite"] if old else [])]
    if old:
        target.mkdir()
        (target / "precious").write_text("the old model")
    assert run(source, target, *options, fault="kill:clean-up").returncode == 137
    number = target.stat().st_ino
    result = run(source, target, *options, "--resume", "--hash", "--json")
    assert result.returncode == 0, result.stderr
    assert target.stat().st_ino == number  # nothing was written again
    assert len(json.loads(result.stdout)["hashes"]) == len(files_of(target))
    convert(source, tmp_path / "expected", to="torch", grid=Parallelism(tp=2))
    assert files_of(target) == files_of(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "meg"]


def test_another_conversion_does_not_take_it_for_its_own(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "meg"
    assert run(source, target, "--tp", "2", fault="kill:clean-up").returncode == 137
    before = files_of(target)
    for options in (["--tp", "2"], ["--tp", "1", "--resume"]):
        result = run(source, target, *options)
        assert (result.returncode, "the destination exists" in result.stderr) == (2, True)
    (target / "latest_checkpointed_iteration.txt").write_text("release and more")
    assert run(source, target, "--tp", "2", "--resume").returncode == 2
    (target / "latest_checkpointed_iteration.txt").write_text("release")
    assert run(source, target, "--tp", "2", "--resume").returncode == 0
    assert files_of(target) == before
