"""What works here: packages, devices, launchers, and the questions that `verify` can answer."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckptkit.requirements import (
    HUB,
    MEGATRON,
    MOVING,
    PACKAGES,
    PEFT,
    RUNNING,
    Package,
    how_to_install,
)
from ckptkit.verification.environment.disk import SIZE, Disk, measure
from ckptkit.verification.environment.probe import probe
from ckptkit.verification.run_options import LEVELS
from ckptkit.version import __version__

SCHEMA = 1
ABSENT = "not installed"
LAUNCHERS = ("torchrun", "srun", "ray")
BYTES, CUDA = "bytes", "cuda"
ABILITIES = {
    BYTES: (MOVING,),
    "hub": (MOVING, HUB),
    **dict.fromkeys(LEVELS[:2], (MOVING,)),
    **dict.fromkeys((*LEVELS[2:], "rollouts", "trainability"), (MOVING, RUNNING, MEGATRON)),
    "adapter": (MOVING, RUNNING, MEGATRON, PEFT),
    CUDA: (MOVING, RUNNING, MEGATRON),
}
"""What can be asked -> the purposes of the packages that it takes."""
MEANINGS = {
    BYTES: "convert, inspect, diff, validate, hash, delta, surgery",
    "hub": "sources org/model",
    "structure": "verify --level structure",
    "weights": "verify --level weights",
    "logits": "verify",
    "gradients": "verify --level gradients",
    "training": "verify --level training",
    "rollouts": "verify --rollouts",
    "trainability": "verify --trainability",
    "adapter": "verify --adapter",
    CUDA: "verify --device cuda",
}
"""What can be asked -> the commands that it is about."""


@dataclass(frozen=True)
class Installed:
    """A package, and how it is installed.

    Attributes:
        name: Its name.
        wanted: The versions that work, as pip takes them.
        version: The installed one; None where it is not installed or does not say.
        problem: Why it does not work; None if it does.
        purpose: What it is for.
    """

    name: str
    wanted: str
    version: str | None
    problem: str | None
    purpose: str


@dataclass(frozen=True)
class Ability:
    """Something that works here, or does not.

    Attributes:
        name: Its name, one of `ABILITIES`.
        commands: The commands that it is about.
        works: Whether it works.
        missing: Packages that are not installed.
        problems: What else keeps it from working.
        install: The line that installs what is missing; None where that is nothing.
    """

    name: str
    commands: str
    works: bool
    missing: list[str]
    problems: list[str]
    install: str | None


@dataclass(frozen=True)
class Environment:
    """What works here.

    Attributes:
        schema: Version of this description.
        ckptkit: Version of ckptkit.
        python: Version of Python.
        platform: Operating system and processor.
        packages: The packages that ckptkit uses.
        devices: CUDA devices: name, and memory in bytes.
        cuda: CUDA release that torch was built for; None without one.
        launchers: Launcher -> where it was found, or None.
        disk: The disk that was measured, if one was asked for.
        abilities: What works.
    """

    schema: int
    ckptkit: str
    python: str
    platform: str
    packages: list[Installed]
    devices: list[dict[str, Any]]
    cuda: str | None
    launchers: dict[str, str | None]
    disk: Disk | None
    abilities: list[Ability]

    def works(self, name: str) -> bool:
        """Whether something works, one of `ABILITIES`."""
        return next(ability.works for ability in self.abilities if ability.name == name)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def environment(folder: str | Path | None = None, *, size: int = SIZE) -> Environment:
    """Looks at this machine. Packages that are there are imported in a process of their own.

    Args:
        folder: A folder whose disk is measured, or None.
        size: Bytes to write there.

    Raises:
        UsageError: There is no such folder.
        StorageError: It cannot be written to.
    """
    disk = None if folder is None else measure(folder, size)
    present = [package for package in PACKAGES if package.present]
    heavy = [package.module for package in present if package.purpose != MOVING]
    found = probe(heavy)
    packages = [_installed(package, package in present, found["errors"]) for package in PACKAGES]
    return Environment(
        schema=SCHEMA,
        ckptkit=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.release()}, {platform.machine()}",
        packages=packages,
        devices=found["devices"],
        cuda=found["cuda"],
        launchers={name: shutil.which(name) for name in LAUNCHERS},
        disk=disk,
        abilities=[_ability(name, packages, found["devices"]) for name in ABILITIES],
    )


def _installed(package: Package, present: bool, errors: dict[str, str]) -> Installed:
    version = package.version if present else None
    problem = errors.get(package.module)
    if not present:
        problem = ABSENT
    elif not package.fits:
        problem = f"{version} is installed, {package.wanted} is needed"
    return Installed(package.name, package.wanted, version, problem, package.purpose)


def _ability(name: str, packages: Sequence[Installed], devices: Sequence[object]) -> Ability:
    broken = [one for one in packages if one.purpose in ABILITIES[name] and one.problem]
    missing = [one.name for one in broken if one.problem == ABSENT]
    problems = [f"{one.name}: {one.problem}" for one in broken if one.problem != ABSENT]
    if name == CUDA and not (devices or missing):
        problems.append("torch sees no CUDA device")
    wanted = {one.name for one in broken}
    install = how_to_install(package for package in PACKAGES if package.name in wanted) if broken else None
    return Ability(name, MEANINGS[name], not (missing or problems), missing, problems, install)
