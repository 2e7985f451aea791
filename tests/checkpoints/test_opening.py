"""A folder has one format, whichever question is asked about it, and an opened checkpoint does not change."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.checkpoints.readers import READERS
from ckptkit.errors import InputError
from ckptkit.formats.registry import FORMATS, format_of
from ckptkit.inspection.validation import validate
from fixtures.make_damaged import SOUND


def test_every_format_has_a_reader() -> None:
    assert list(READERS) == [format.name for format in FORMATS]


@pytest.mark.parametrize(
    ("base", "name"), [("hf", "hf"), ("torch/release", "torch"), ("torch_dist/release", "torch_dist")]
)
def test_formats_are_recognised(base: str, name: str) -> None:
    found = format_of(SOUND / base)
    assert found is not None and found.name == name and not found.bare
    count = 0
    for check in found.checks(SOUND / base):
        check()
        count += 1
    assert count > 1


def test_a_config_alone_is_a_model_without_weights(tmp_path: Path) -> None:
    assert format_of(tmp_path) is None
    with pytest.raises(InputError, match="not a checkpoint that ckptkit knows"):
        open_checkpoint(tmp_path)
    assert not validate(tmp_path).passed
    (tmp_path / "config.json").write_text("{}")
    found = format_of(tmp_path)
    assert found is not None and found.name == "hf"
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "release").mkdir()
    assert format_of(tmp_path) is None


def test_a_checkpoint_does_not_change() -> None:
    checkpoint = open_checkpoint(SOUND / "torch")
    with pytest.raises(FrozenInstanceError):
        checkpoint.notes = ()  # type: ignore[misc]
    noted = checkpoint.noting("one", "two")
    assert noted.notes == (*checkpoint.notes, "one", "two") and noted.tensors is checkpoint.tensors
