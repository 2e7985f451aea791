"""What is written is resolved once, and every format takes the options that it names, and no others."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion import target
from ckptkit.conversion.convert import convert
from ckptkit.conversion.execution import Execution, How
from ckptkit.conversion.options import Options, check_options
from ckptkit.conversion.quantising import Quantise
from ckptkit.conversion.targets import NAMES, format_called
from ckptkit.errors import UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.family import Family
from tests.models import save_llama

OTHER: dict[str, Any] = {
    "grid": Parallelism(2),
    "spec": "local",
    "experts": "grouped",
    "make_vocab_size_divisible_by": 64,
    "megatron_model": "hybrid",
    "megatron_core": "0.19",
    "shard_size": 1000,
    "adapter_layout": "canonical",
    "quantise": Quantise("int4"),
}
"""A value besides the default, for each option that not all formats take."""


@pytest.mark.parametrize("to", NAMES)
def test_facts_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    source = save_llama(tmp_path / "hf")
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    count(Family, "spelling")
    for name in ("vocabulary_multiple", "to_args", "run_config"):
        count(target, name)
    convert(source, tmp_path / "out", to=to, dry_run=True)
    expected = {"spelling": 1, "to_args": 1}
    sharded = {**expected, "vocabulary_multiple": 1}
    assert calls == {"hf": {}, "packed": expected, "torch": sharded, "torch_dist": {**sharded, "run_config": 1}}[to]


@pytest.mark.parametrize("to", NAMES)
def test_each_format_takes_the_options_that_it_names(to: str) -> None:
    format = format_called(to)
    assert format.name == to and format.takes < OTHER.keys()
    for name, value in OTHER.items():
        options = Options(**{name: value})
        if name in format.takes:
            check_options(options, format)
        else:
            with pytest.raises(UsageError, match=f"applies only to .*, and --to is {to}"):
                check_options(options, format)


def test_every_option_is_for_all_formats_or_says_for_which() -> None:
    named = {option.name for option in fields(Options) if "only" in option.metadata}
    assert named == OTHER.keys()
    for name in named:
        taken = [format_called(to).name for to in NAMES if name in format_called(to).takes]
        assert 0 < len(taken) < len(NAMES)


def test_how_names_all_of_an_execution(tmp_path: Path) -> None:
    assert list(How.__annotations__) == [field.name for field in fields(Execution)]
    with pytest.raises(TypeError, match="overwrit"):
        convert(tmp_path, tmp_path / "out", to="hf", overwrit=True)  # type: ignore[call-arg]


def test_the_names_of_formats_are_cheap() -> None:
    """The command line needs them for its help."""
    code = (
        "import sys, ckptkit.conversion.targets; print(*(name for name in sys.modules if name.startswith('ckptkit')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = {"ckptkit", "ckptkit.version", "ckptkit.errors", "ckptkit.conversion", "ckptkit.conversion.targets"}
    assert set(done.stdout.split()) == expected
