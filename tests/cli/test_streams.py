"""Closed, full and narrow standard streams: the work keeps its own exit code, or it is 5; never 1, never a traceback.

As users meet them: in a shell, with redirections.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ckptkit import convert
from fixtures.make_damaged import SOUND

ROOT = Path(__file__).resolve().parents[2]
KIT = f"{shlex.quote(sys.executable)} -m ckptkit"
HF = SOUND / "hf"
TRACES = ("Traceback", "Exception ignored", "Logging error")


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(["bash", "-c", command], env=variables, capture_output=True, timeout=120, cwd=ROOT)
    assert not any(trace.encode() in done.stderr + done.stdout for trace in TRACES), done.stderr
    return done


REDIRECTIONS = {
    "stdout closed": (">&-", {0}),
    "stderr closed": ("2>&-", {0}),
    "stdin closed": ("<&-", {0}),
    "all closed": ("<&- >&- 2>&-", {0}),
    "stdout full": (">/dev/full", {5}),
    "stderr full": ("2>/dev/full", {0}),
    "both full": (">/dev/full 2>&1", {5}),
}
WORK = {
    "families": "families",
    "JSON": "inspect {hf} --json",
    "table": "inspect {hf}",
    "equal": "verify {hf} {hf} --level weights",
    "equal, JSON": "verify {hf} {hf} --level weights --json -",
    "hash": "hash {hf} --only tensors",
}


@pytest.mark.parametrize("redirection", REDIRECTIONS)
@pytest.mark.parametrize("work", WORK)
def test_what_works_keeps_its_code(work: str, redirection: str) -> None:
    where, codes = REDIRECTIONS[redirection]
    assert shell(f"{KIT} {WORK[work].format(hf=HF)} {where}").returncode in codes


@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_what_fails_keeps_its_code(redirection: str) -> None:
    where = REDIRECTIONS[redirection][0]
    assert shell(f"{KIT} inspect /nonexistent/model {where}").returncode == 3
    assert shell(f"{KIT} convert a b --to nonsense {where}").returncode == 2
    assert shell(f"{KIT} convert a b --to nonsense --json {where}").returncode in (2, 5)


@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_a_conversion_is_whole_whatever_becomes_of_its_words(tmp_path: Path, redirection: str) -> None:
    """A closed descriptor's number must not go to an output file, into which a message would then be written."""
    where, codes = REDIRECTIONS[redirection]
    convert(HF, tmp_path / "expected", to="torch")
    assert shell(f"{KIT} convert {HF} {tmp_path / 'out'} --to torch {where}").returncode in codes
    files = [path for path in sorted((tmp_path / "expected").rglob("*")) if path.is_file() and path.suffix == ".pt"]
    assert files
    for path in files:
        assert (tmp_path / "out" / path.relative_to(tmp_path / "expected")).read_bytes() == path.read_bytes()


def test_a_difference_is_still_one(tmp_path: Path) -> None:
    other = tmp_path / "other"
    convert(HF, other, to="hf")
    weights = max(other.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for where, code in ((">&-", 1), ("2>&-", 1), (">/dev/full", 5)):
        assert shell(f"{KIT} verify {HF} {other} --level weights {where}").returncode == code


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
def test_terminals_that_are_not_utf8(tmp_path: Path, encoding: str) -> None:
    place = tmp_path / "größe-模型-🤗"
    done = shell(f"{KIT} convert {HF} {place} --to hf", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and place.is_dir(), done.stderr
    assert b"Wrote" in done.stdout
    done = shell(f"{KIT} inspect {place} --json", PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert json.loads(done.stdout.decode(encoding))["path"] == str(place)
    assert shell(f"{KIT} inspect {place}/none", PYTHONIOENCODING=encoding).returncode == 3


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_no_text(tmp_path: Path, encoding: str) -> None:
    """A path may be any bytes; Python makes surrogates of them, which no encoding takes."""
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    quoted = shlex.quote(os.fsdecode(folder))
    command = f"{KIT} convert {HF} {quoted} --to hf".encode("utf-8", "surrogateescape")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run([b"bash", b"-c", command], env=variables, capture_output=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report = tmp_path / "report.json"
    command = f"{KIT} verify {HF} {quoted} --level weights --json {report}".encode("utf-8", "surrogateescape")
    done = subprocess.run([b"bash", b"-c", command], env=variables, capture_output=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert rb"\udcff\udcfe" in done.stdout
    assert json.loads(report.read_text())["verdict"] == "same"
