"""`ckptkit watch`: every iteration once, when it is finished, whatever the writer and the machine do meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ckptkit import Parallelism, convert
from ckptkit.cli import app as cli
from ckptkit.cli.watch import LEVELS
from ckptkit.errors import InputError, StorageError, UsageError
from ckptkit.runs import record
from ckptkit.runs.iterations import Iterations
from ckptkit.runs.record import Entry, Record, held
from ckptkit.runs.watch import Wanted, Watched
from ckptkit.runs.watch import watch as watch_run
from ckptkit.verification import run_options
from fixtures.make_damaged import SOUND
from tests.models import files_of

ROOT = Path(__file__).resolve().parents[2]
TRACKER = "latest_checkpointed_iteration.txt"
HF = SOUND / "hf"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Iteration -> a Hugging Face directory with other weights."""
    found = {}
    for number in (10, 20, 30):
        folder = tmp_path_factory.mktemp(f"model{number}") / "hf"
        shutil.copytree(HF, folder)
        for file in folder.glob("*.safetensors"):
            data = bytearray(file.read_bytes())
            data[-64:] = np.full(32, number, dtype="<u2").tobytes()
            file.write_bytes(data)
        found[number] = folder
    return found


@pytest.fixture(scope="module")
def saved(models: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Iteration -> its folder as Megatron-LM saves it at TP2."""
    found = {}
    for number, model in models.items():
        out = tmp_path_factory.mktemp(f"saved{number}") / "run"
        convert(model, out, to="torch", grid=Parallelism(tp=2))
        found[number] = out / "release"
    return found


def save(run: Path, number: int, source: Path, pause: Callable[[], object] = lambda: None) -> None:
    """Saves an iteration as Megatron-LM does: file by file, in pieces, and then the tracker."""
    folder = run / f"iter_{number:07d}"
    for file in sorted(source.rglob("*.pt")):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True)
        data = file.read_bytes()
        with target.open("wb") as stream:
            for start in range(0, len(data), 1 + len(data) // 3):
                stream.write(data[start : start + 1 + len(data) // 3])
                stream.flush()
                pause()
    (run / TRACKER).write_text(str(number), encoding="utf-8")


def wanted(run: Path, out: Path, **changes: Any) -> Wanted:
    from ckptkit.checkpoints.source_options import SourceOptions

    values = {"to": "hf", "options": {}, "source": SourceOptions(hf_reference=str(HF)), **changes}
    return Wanted(run=run, out=out, **values)


def states(found: Watched) -> dict[int, str]:
    return {number: entry.state for number, entry in found.iterations.items()}


def run_of(saved: dict[int, Path], folder: Path) -> Path:
    """A run with all iterations."""
    run = folder / "run"
    run.mkdir()
    for number, source in saved.items():
        save(run, number, source)
    return run


def assert_is(out: Path, number: int, models: dict[int, Path]) -> None:
    assert files_of(out / f"iter_{number:07d}") == files_of(models[number])


def test_levels_are_those_of_verify() -> None:
    assert LEVELS == run_options.LEVELS


def test_iterations_are_converted_while_a_writer_saves(
    models: dict[int, Path], saved: dict[int, Path], tmp_path: Path
) -> None:
    run, out, said = tmp_path / "run", tmp_path / "out", []
    looks = threading.Semaphore(0)  # the writer goes on by a piece whenever somebody has looked

    def write() -> None:
        looks.acquire(timeout=60)
        run.mkdir()
        for number, source in saved.items():
            save(run, number, source, lambda: looks.acquire(timeout=60))

    writer = threading.Thread(target=write)
    writer.start()
    found = watch_run(wanted(run, out), until=30, tell=said.append, wait=lambda seconds: looks.release())
    writer.join()
    assert states(found) == dict.fromkeys(saved, "converted") and found.exit_code == 0
    assert [line.split(":")[0] for line in said] == [f"iter_{number:07d}" for number in saved]
    for number in saved:
        assert_is(out, number, models)


def test_an_iteration_that_is_being_saved_is_not_touched(saved: dict[int, Path], tmp_path: Path) -> None:
    run = run_of({10: saved[10]}, tmp_path)
    shutil.copytree(saved[20], run / "iter_0000020")
    found = watch_run(wanted(run, tmp_path / "out"), once=True)
    assert states(found) == {10: "converted"}


def test_without_a_tracker_files_must_have_settled(saved: dict[int, Path], tmp_path: Path) -> None:
    now = [0.0]
    looking = Iterations(tmp_path, 60.0, lambda: now[0])
    assert looking.finished() == {}
    shutil.copytree(saved[10], tmp_path / "step_10")
    assert looking.finished() == {}
    now[0] = 59.0
    assert looking.finished() == {}
    (tmp_path / "step_10" / "more").write_text("x", encoding="utf-8")
    now[0] = 100.0
    assert looking.finished() == {}
    now[0] = 160.0
    assert looking.finished() == {10: tmp_path / "step_10"}
    (tmp_path / "step_20").mkdir()
    now[0] = 999.0
    assert list(looking.finished()) == [10]  # an empty folder is none


@pytest.mark.parametrize(("text", "found"), [("", []), ("release", []), ("10", [10]), ("25\n", [10, 20])])
def test_the_tracker_says_what_is_finished(text: str, found: list[int], tmp_path: Path) -> None:
    for number in (10, 20, 30):
        (tmp_path / f"iter_{number:07d}").mkdir()
    (tmp_path / TRACKER).write_text(text, encoding="utf-8")
    assert list(Iterations(tmp_path, 0.0).finished()) == found


def test_a_tracker_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("soon", encoding="utf-8")
    with pytest.raises(InputError, match="expected an iteration or `release`, found 'soon'"):
        Iterations(tmp_path, 0.0).finished()


@pytest.mark.parametrize("level", ["structure", "weights"])
def test_outputs_are_verified(level: str, saved: dict[int, Path], tmp_path: Path) -> None:
    run, out = run_of(saved, tmp_path), tmp_path / "out"
    found = watch_run(wanted(run, out, verify=level), once=True)
    assert states(found) == dict.fromkeys(saved, "same")
    reports = [json.loads((out / "reports" / f"iter_{number:07d}.json").read_text()) for number in saved]
    assert all(report["verdict"] == "same" and report["levels"][-1]["name"] == level for report in reports)


def test_a_difference_is_kept_and_gives_its_exit_code(
    saved: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptkit.conversion import convert as conversion

    real = conversion.convert

    def faulty(src: Path, dst: Path, **options: Any) -> Any:
        result = real(src, dst, **options)
        if options["iteration"] == 10:
            file = next(dst.glob("*.safetensors"))
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        return result

    monkeypatch.setattr(conversion, "convert", faulty)
    run, out = run_of(saved, tmp_path), tmp_path / "out"
    assert states(watch_run(wanted(run, out, verify="weights", keep=3), once=True)) == {
        10: "differs",
        20: "same",
        30: "same",
    }
    found = watch_run(wanted(run, out, verify="weights", keep=1), once=True)
    assert states(found) == {10: "differs", 20: "removed", 30: "same"} and found.exit_code == 1
    assert (out / "iter_0000010").is_dir() and not (out / "iter_0000020").exists()


def test_a_damaged_iteration_does_not_stop_the_others(
    models: dict[int, Path], saved: dict[int, Path], tmp_path: Path
) -> None:
    run, out = run_of(saved, tmp_path), tmp_path / "out"
    file = next((run / "iter_0000020").rglob("*.pt"))
    file.write_bytes(file.read_bytes()[:-100])
    done = CliRunner().invoke(
        cli.app, ["watch", str(run), "--to", "hf", "-o", str(out), "--hf-reference", str(HF), "--once", "--json"]
    )
    assert done.exit_code == InputError.exit_code
    found = {one["iteration"]: one for one in json.loads(done.stdout)["iterations"]}
    assert [one["state"] for one in found.values()] == ["converted", "failed", "converted"]
    assert file.name in found[20]["said"] and not (out / "iter_0000020").exists()
    assert_is(out, 30, models)


def test_a_foreign_folder_does_not_stop_the_others(saved: dict[int, Path], tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for number in (10, 20):
        save(run, number, saved[number])
    (out / "iter_0000010").mkdir(parents=True)
    (out / "iter_0000010" / "own").write_text("mine", encoding="utf-8")
    found = watch_run(wanted(run, out), once=True)
    assert (found.iterations[10].state, found.iterations[20].state) == (record.FAILED, record.CONVERTED)
    assert "was not made by this command" in found.iterations[10].said and found.exit_code == UsageError.exit_code
    assert [file.name for file in (out / "iter_0000010").iterdir()] == ["own"]


def test_a_run_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="no such directory"):
        watch_run(wanted(tmp_path / "run", tmp_path / "out"), wait=lambda seconds: pytest.fail("it waits"))


def test_old_outputs_are_removed_and_nothing_else(
    models: dict[int, Path], saved: dict[int, Path], tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    (out / "iter_0000005").mkdir(parents=True)
    for number, source in saved.items():
        save(run, number, source)
        found = watch_run(wanted(run, out, keep=1), once=True)
    assert states(found) == {10: "removed", 20: "removed", 30: "converted"}
    assert sorted(item.name for item in out.iterdir()) == [record.LOCK, "iter_0000005", "iter_0000030", record.NAME]
    assert_is(out, 30, models)
    assert states(watch_run(wanted(run, out, keep=1), once=True)) == states(found)


def test_what_would_be_removed_at_once_is_not_made(saved: dict[int, Path], tmp_path: Path) -> None:
    run = run_of(saved, tmp_path)
    found = watch_run(wanted(run, tmp_path / "out", keep=1, first=20), once=True)
    assert states(found) == {20: "skipped", 30: "converted"}


def test_an_iteration_that_the_run_removed_is_left_out(
    saved: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of({10: saved[10]}, tmp_path)
    there = Iterations.finished

    def removed(self: Iterations) -> dict[int, Path]:
        found = there(self)
        shutil.rmtree(run / "iter_0000010", ignore_errors=True)
        return found

    monkeypatch.setattr(Iterations, "finished", removed)
    found = watch_run(wanted(run, tmp_path / "out"), once=True)
    assert states(found) == {10: "skipped"}


def test_a_killed_watch_goes_on(models: dict[int, Path], saved: dict[int, Path], tmp_path: Path) -> None:
    run, out = run_of({10: saved[10], 20: saved[20]}, tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "ckptkit", "watch", str(run), "--to", "hf", "-o", str(out), "--every", "0.1"]
    command += ["--hf-reference", str(HF), "--until", "30"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "iter_0000010").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    save(run, 30, saved[30])
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for number in saved:
        assert_is(out, number, models)
    assert [item.name for item in out.iterdir() if "partial" in item.name] == []


def test_verification_follows_where_a_watch_was_killed_before_it(saved: dict[int, Path], tmp_path: Path) -> None:
    run, out = run_of({10: saved[10]}, tmp_path), tmp_path / "out"
    assert states(watch_run(wanted(run, out), once=True)) == {10: "converted"}
    assert states(watch_run(wanted(run, out, verify="weights"), once=True)) == {10: "same"}


def test_other_settings_are_another_folder(saved: dict[int, Path], tmp_path: Path) -> None:
    run, out = run_of({10: saved[10]}, tmp_path), tmp_path / "out"
    watch_run(wanted(run, out), once=True)
    with pytest.raises(UsageError, match=r"other settings \(dtype\)"):
        watch_run(wanted(run, out, options={"dtype": "float32"}), once=True)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"schema": 2}',
        '{"schema": 1, "settings": {}, "iterations": {"x": 1}}',
        '{"schema": 1, "settings": {}, "iterations": {"1": {"state": "odd", "folder": "a", "said": "", "when": "", '
        '"code": 0}}}',
        '{"schema": 1, "settings": {}, "iterations": {"1": {"state": "same", "folder": "../a", "said": "", "when": "", '
        '"code": 0}}}',
    ],
)
def test_a_damaged_record_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / record.NAME).write_text(content, encoding="utf-8")
    with pytest.raises(InputError):
        Record(tmp_path, {})


def test_a_record_is_read_again(tmp_path: Path) -> None:
    entry = Entry("failed", "iter_0000001", "why", code=3)
    Record(tmp_path, {"to": "hf"}).put(1, entry)
    assert Record(tmp_path, {"to": "hf"}).entries == {1: entry}


def test_two_watches_of_one_folder_exclude_each_other(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UsageError, match="another ckptkit watch"), held(tmp_path):
        pass
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError), held(tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"out": "run/out"}, {}, "lie in each other"),
        ({"out": "."}, {}, "lie in each other"),
        ({"keep": 0}, {}, "at least 1 stays"),
        ({"run": "gone"}, {"once": True}, "no such directory"),
    ],
)
def test_requests_that_make_no_sense(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    values = {"run": tmp_path / "run", "out": tmp_path / "out"}
    values |= {name: tmp_path / value if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises((UsageError, InputError), match=message):
        watch_run(wanted(**values), **options)


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    words = ["watch", str(tmp_path), "--to", "hf", "-o", "out", "--once", "--until", "3"]
    assert CliRunner().invoke(cli.app, words).exit_code == 2
    words = ["watch", str(tmp_path), "--to", "hf", "-o", str(tmp_path.parent / "out"), "--once", "--iteration", "3"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 2 and "--first" in done.stderr


@pytest.mark.slow
def test_outputs_are_run(tmp_path: Path) -> None:
    """The iteration in megatron-core on its grid, against the output in transformers."""
    from ckptkit.checkpoints.source_options import SourceOptions
    from tests.models import save_llama

    model = save_llama(tmp_path / "model")
    convert(model, tmp_path / "saved", to="torch", grid=Parallelism(tp=2))
    run = tmp_path / "run"
    run.mkdir()
    save(run, 10, tmp_path / "saved" / "release")
    source = SourceOptions(hf_reference=str(model))
    found = watch_run(wanted(run, tmp_path / "out", verify="logits", source=source), once=True)
    assert states(found) == {10: "same"} and found.iterations[10].said.startswith("logits: ")
