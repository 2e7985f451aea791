"""What a release consists of: versions that agree, workflows that are sound, examples whose commands exist and run."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ckptkit.cli import app as cli
from ckptkit.requirements import HUB, MOVING, packages_for
from ckptkit.version import __version__
from tests.models import save_llama

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SMALL = " ".join(f"'{package.wanted}'" for package in packages_for(MOVING))
GITLAB = ROOT / "examples" / "ci" / "gitlab-ci.yml"


def parsed(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_version_has_a_section_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    assert versions[0] == __version__ and text.index("## [Unreleased]") < text.index(f"## [{__version__}]")


def test_the_sdist_holds_what_is_listed() -> None:
    listed = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert [name for name in listed if not (ROOT / name).exists()] == []
    assert {"SECURITY.md", "docs", "docs_site", "tests", "fixtures"} <= set(listed)


def test_publishing_needs_no_stored_token() -> None:
    workflow = parsed(".github/workflows/release.yml")
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert workflow["permissions"] == {"contents": "read"} and workflow[True]["push"]["tags"] == ["v*"]
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"] == "pypi"
    used = [step["uses"].split("@")[0] for job in (build, publish) for step in job["steps"] if "uses" in step]
    assert {"actions/attest-build-provenance", "pypa/gh-action-pypi-publish"} <= set(used)
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    commands = [step["run"] for step in build["steps"] if "run" in step]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("-m build --outdir dist .", "-m twine check --strict dist/*", "bash examples/check_wheel.sh dist"):
        assert any(command in line for line in commands) and command in makefile
    assert re.search(r"^test-all: .*\bdist\b", makefile, re.MULTILINE)


def test_the_tag_is_compared_with_the_version() -> None:
    (line,) = [
        step["run"]
        for step in parsed(".github/workflows/release.yml")["jobs"]["build"]["steps"]
        if "GITHUB_REF_NAME" in step.get("run", "")
    ]
    import subprocess

    def code(tag: str) -> int:
        return subprocess.run(
            ["bash", "-c", line], cwd=ROOT, env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}
        ).returncode

    assert (code(f"v{__version__}"), code("v9.9.9")) == (0, 1)


def test_issue_templates_are_forms() -> None:
    for name in ("conversion", "family"):
        form = parsed(f".github/ISSUE_TEMPLATE/{name}.yml")
        assert form["name"] and form["description"] and len({part["id"] for part in form["body"]}) == len(form["body"])
        assert all(part["attributes"]["label"] for part in form["body"])
    assert parsed(".github/ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": True}


def test_small_installations_name_the_same_packages() -> None:
    container = (ROOT / "Containerfile").read_text(encoding="utf-8")
    (hub,) = packages_for(HUB)
    assert f"pip install --no-cache-dir {SMALL} '{hub.wanted}'" in container
    assert SMALL in (ROOT / "examples" / "check_wheel.sh").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.+)$", container, re.MULTILINE) for word in line.split()[:-1]]
    assert [word for word in copied if not (ROOT / word).exists()] == [] and "USER ckptkit" in container


def test_tests_that_hold_promises_are_there() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", text))
    assert len(named) >= 12 and [path for path in named if not (ROOT / path).is_file()] == []
    rows = [row for row in re.findall(r"^\| (.+) \|$", text, re.MULTILINE) if not row.startswith(("promise", "---"))]
    assert all("`tests/" in row for row in rows)


def test_the_code_of_a_checkpoint_is_never_trusted() -> None:
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "ckptkit").rglob("*.py")]
    assert not any(re.search(r"trust_remote_code\s*=\s*True", source) for source in sources)


def gitlab_commands() -> list[str]:
    job = parsed("examples/ci/gitlab-ci.yml")["verify-checkpoint"]
    found: list[str] = [line for line in job["script"] if line.startswith("ckptkit ")]
    return found


def test_the_example_for_gitlab_is_sound() -> None:
    content = parsed("examples/ci/gitlab-ci.yml")
    job = content["verify-checkpoint"]
    assert job["artifacts"]["when"] == "always" and job["artifacts"]["reports"]["junit"] == "report.xml"
    assert [line.split()[1] for line in gitlab_commands()] == ["doctor", "convert", "verify"]
    written = {"conversion.json", *re.findall(r"report\.\w+", gitlab_commands()[-1])}
    assert written == {*job["artifacts"]["paths"], "report.xml"}
    for line in gitlab_commands():
        _, command, *words = shlex.split(line)
        help_text = CliRunner().invoke(cli.app, [command, "--help"]).output
        assert all(word in help_text for word in words if word.startswith("--"))


def github_commands() -> list[str]:
    steps = parsed("examples/ci/github-workflow.yml")["jobs"]["verify"]["steps"]
    return [step["run"].strip() for step in steps if step.get("run", "").startswith("ckptkit ")]


def test_the_example_for_github_is_sound() -> None:
    content = parsed("examples/ci/github-workflow.yml")
    assert content["jobs"]["verify"]["permissions"] == {"contents": "read"}
    assert [line.split()[1] for line in github_commands()] == ["convert", "verify"]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["github-workflow.yml", "gitlab-ci.yml"])
def test_the_commands_of_the_examples_run(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_llama(tmp_path / "model")
    content = parsed(f"examples/ci/{file}")
    settings = content["variables"] if file == "gitlab-ci.yml" else content["env"]
    variables = {"$REFERENCE": "model", "$GRID": settings["GRID"]}
    for line in gitlab_commands() if file == "gitlab-ci.yml" else github_commands():
        for name, value in variables.items():
            line = line.replace(f'"{name}"', value).replace(name, value)
        words = shlex.split(line.split(" > ")[0])[1:]
        done = CliRunner().invoke(cli.app, words, prog_name="ckptkit")
        assert done.exit_code == 0, done.output
    assert all((tmp_path / name).is_file() for name in ("report.json", "report.xml", "report.html"))
