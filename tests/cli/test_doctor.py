"""`ckptkit doctor`: what is there is seen, what is missing comes with its line, and every exit code is documented."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ckptkit import requirements
from ckptkit.cli import app as cli
from ckptkit.cli.doctor import QUESTIONS
from ckptkit.errors import StorageError, UsageError, VerificationError
from ckptkit.requirements import HUB, MEGATRON, MOVING, PACKAGES, PEFT, RUNNING, Package, package_of, within
from ckptkit.verification.environment import disk, probe, summary
from ckptkit.verification.environment.needs import require
from tests.without import ROOT, ckptkit

RUNS = ("logits", "gradients", "training", "rollouts", "trainability", "adapter", "cuda")


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Stands in for the process that imports packages."""
    answer: dict[str, object] = {"errors": {}, "devices": [], "cuda": None}
    monkeypatch.setattr(summary, "probe", lambda modules: answer)
    return answer


def doctor(*arguments: str) -> tuple[int, dict[str, object]]:
    done = CliRunner().invoke(cli.app, ["doctor", *arguments, "--json"], prog_name="ckptkit")
    return done.exit_code, json.loads(done.stdout)


def test_packages_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {*project["dependencies"], *project["optional-dependencies"]["test"]}
    assert {package.wanted for package in PACKAGES} <= declared
    assert set(project["dependencies"]) == {package.wanted for package in PACKAGES if package.purpose != PEFT}


def test_questions_are_those_of_the_summary() -> None:
    assert tuple(summary.ABILITIES) == QUESTIONS == tuple(summary.MEANINGS)


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.6.0", ">=2.6", True),
        ("2.10.1+cu128", ">=2.6", True),
        ("2.5.9", ">=2.6", False),
        ("0.16.1", ">=0.16.1,<0.20", True),
        ("0.16.0", ">=0.16.1,<0.20", False),
        ("0.19.2", ">=0.16.1,<0.20", True),
        ("0.20.0", ">=0.16.1,<0.20", False),
        ("0.20", ">=0.16.1,<0.20", False),
        ("2.6.0rc1", ">=2.6", True),
        ("unknown", ">=2.6", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, bounds: str, fits: bool) -> None:
    assert within(version, bounds) == fits


def test_modules_belong_to_packages() -> None:
    assert package_of("yaml.loader") == next(package for package in PACKAGES if package.name == "pyyaml")
    assert package_of("megatron.core.models") is not None and package_of("ckptkit.cli") is package_of(None) is None


def test_what_is_installed_is_seen(imported: dict[str, object], tmp_path: Path) -> None:
    imported["devices"] = [{"name": "GPU", "memory": 10**9}]
    code, found = doctor(str(tmp_path), "--size", "8MB", "--for", "cuda")
    assert code == 0 and found["schema"] == summary.SCHEMA
    assert all(package["problem"] is None for package in found["packages"])
    assert all(ability["works"] and ability["install"] is None for ability in found["abilities"])
    assert found["disk"]["folder"] == str(tmp_path) and found["disk"]["bytes"] == 1 << 22
    assert found["disk"]["write"] > 0 and found["disk"]["read"] > 0 and list(tmp_path.iterdir()) == []


def test_without_a_device_cuda_does_not_work(imported: dict[str, object]) -> None:
    assert doctor("--for", "logits")[0] == 0
    assert doctor("--for", "cuda")[0] == VerificationError.exit_code


def test_a_package_that_breaks_on_import_is_named(imported: dict[str, object]) -> None:
    imported["errors"] = {"transformers": "RuntimeError: operator torchvision::nms does not exist"}
    code, found = doctor("--for", "logits")
    assert code == VerificationError.exit_code
    works = {ability["name"]: ability["works"] for ability in found["abilities"]}
    assert works == {name: name not in RUNS for name in QUESTIONS}
    (reason,) = next(ability["problems"] for ability in found["abilities"] if ability["name"] == "logits")
    assert reason == "transformers: RuntimeError: operator torchvision::nms does not exist"


def test_a_package_of_another_version_is_named(imported: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Package, "version", property(lambda self: "0.1"))
    code, found = doctor()
    assert code == 70
    assert {package["problem"] for package in found["packages"]} == {
        f"0.1 is installed, {package.wanted} is needed" for package in PACKAGES
    }


@pytest.mark.parametrize("modules", [[], ["json"]])
def test_the_probe_imports(modules: list[str]) -> None:
    assert probe.probe(modules) == {"errors": {}, "devices": [], "cuda": None}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('one\\ntwo')", "RuntimeError: one"),
        ("import os; os.write(2, b'gone\\n'); os._exit(9)", "importing ended with code 9: gone"),
        ("import os; os.abort()", "importing ended with code -6: no message"),
        ("import time; time.sleep(60)", "importing it took more than 1 s"),
    ],
)
def test_a_package_that_ends_the_probe_is_named(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text(body, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(probe, "PATIENCE", 1.0 if "sleep" in body else 60.0)
    assert probe.probe(["broken_package"])["errors"] == {"broken_package": said}


def test_without_torch_the_commands_that_move_bytes_work() -> None:
    done = ckptkit("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [one["name"] for one in found["abilities"] if one["works"]] == ["bytes", "structure", "weights"]
    logits = next(one for one in found["abilities"] if one["name"] == "logits")
    assert logits["missing"] == ["torch", "transformers", "safetensors", "megatron-core"]
    assert logits["install"].startswith("pip install 'torch>=") and "'megatron-core>=" in logits["install"]
    text = ckptkit("doctor", "--for", "logits")
    assert text.returncode == VerificationError.exit_code
    assert f"to install: {logits['install']}\n" in text.stdout


def test_without_what_every_command_needs_the_code_is_another() -> None:
    done = ckptkit("doctor", "--json", without=["numpy"])
    assert done.returncode == 70 and not json.loads(done.stdout)["abilities"][0]["works"]


def test_a_folder_that_is_none_or_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        disk.measure(tmp_path / "gone")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(StorageError, match="No space left"):
        disk.measure(tmp_path)


def test_runs_ask_for_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    require(RUNNING, MEGATRON)
    monkeypatch.setattr(requirements, "find_spec", lambda module: None)
    with pytest.raises(VerificationError, match="torch, transformers and safetensors are not installed; pip install"):
        require(RUNNING)
    assert [package.present for package in PACKAGES if package.purpose in (MOVING, HUB)] == [False] * 5
