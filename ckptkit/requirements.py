"""The packages that ckptkit uses, and what each is for. No package is imported to find out whether it is there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

MOVING, HUB, RUNNING, MEGATRON, PEFT = "every command", "models on the hub", "running models", "Megatron ranks", "peft"
"""What packages are for."""


@dataclass(frozen=True)
class Package:
    """A package.

    Attributes:
        name: Name of the distribution.
        module: What is imported of it.
        bounds: Versions that work, as in pyproject.toml.
        purpose: What it is for.
    """

    name: str
    module: str
    bounds: str
    purpose: str

    @property
    def wanted(self) -> str:
        """The package as pip takes it."""
        return f"{self.name}{self.bounds}"

    @property
    def present(self) -> bool:
        """Whether it can be found."""
        try:
            return find_spec(self.module) is not None
        except (ImportError, ValueError):
            return False

    @property
    def version(self) -> str | None:
        """The installed version; None where none is recorded."""
        from importlib import metadata  # it loads much that no command needs

        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return None

    @property
    def fits(self) -> bool:
        """Whether the installed version is within the bounds; one that is not recorded counts as such."""
        return self.version is None or within(self.version, self.bounds)


PACKAGES = (
    Package("numpy", "numpy", ">=1.26", MOVING),
    Package("pyyaml", "yaml", ">=6.0", MOVING),
    Package("rich", "rich", ">=13.9", MOVING),
    Package("typer", "typer", ">=0.20", MOVING),
    Package("huggingface-hub", "huggingface_hub", ">=1.0", HUB),
    Package("torch", "torch", ">=2.6", RUNNING),
    Package("transformers", "transformers", ">=5.0", RUNNING),
    Package("safetensors", "safetensors", ">=0.5", RUNNING),
    Package("megatron-core", "megatron.core", ">=0.16.1,<0.20", MEGATRON),
    Package("peft", "peft", ">=0.21", PEFT),
)
"""All of them; a test compares them with pyproject.toml."""


def packages_for(*purposes: str) -> list[Package]:
    """The packages for some purposes."""
    return [package for package in PACKAGES if package.purpose in purposes]


def package_of(module: str | None) -> Package | None:
    """The package that an imported module belongs to, or None."""
    top = (module or "").split(".")[0]
    return next((package for package in PACKAGES if package.module.split(".")[0] == top), None)


def how_to_install(packages: Iterable[Package]) -> str:
    """The line that installs some packages."""
    words = (f"'{package.wanted}'" for package in packages)
    return f"pip install {' '.join(words)}"


def missing_line(packages: Iterable[Package]) -> tuple[str, str]:
    """What is missing, and what to do, in words."""
    missing = list(packages)
    names = [package.name for package in missing]
    *others, last = names
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"{listed} {'are' if others else 'is'} not installed", how_to_install(missing)


def within(version: str, bounds: str) -> bool:
    """Whether a version is within bounds such as `>=0.16.1,<0.20`. Only numbers count: `2.6.0rc1` is `2.6.0`."""
    found = _numbers(version)
    for bound in bounds.split(","):
        operator, limit = bound[:2] if bound[1] == "=" else bound[:1], _numbers(bound.lstrip("<>="))
        if (operator == ">=" and found < limit) or (operator == "<" and found >= limit):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a release without the zeros at its end, so that 0.20 and 0.20.0 are equal."""
    match = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)", version)
    numbers = [int(number) for number in match[1].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
