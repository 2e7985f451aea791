"""The catalogue of damaged inputs is whole, and the documentation shows it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures import make_damaged
from fixtures.make_damaged import BEGIN, DAMAGES, END, PAGE, SOUND, catalogue, with_table, write_hf
from tests.models import files_of

# What the catalogue is to hold, by a word of the case's name.
KINDS = [
    "truncated-by",
    "trailing-bytes",
    "lfs-pointer",
    "html-page",
    "zeros",
    "overlapping",
    "hole",
    "unknown-dtype",
    "header-of-100-mb",
    "missing-file",
    "tensor-in-two-shards",
    "stale-shards",
    "rank-missing",
    "ranks-disagree",
    "rank-runs-code",
    "bin-runs-code",
    "index-leaves-the-folder",
    "links-outside",
    "other-safetensors",
    "other-original",
    "other-gguf",
    "quantised-by-config",
    "quantised-fp8",
    "quantised-gptq",
    "quantised-bitsandbytes",
    "metadata-leaves-the-folder",
    "chunks-overlap",
    "chunks-leave-a-hole",
    "distcp-cut-short",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_damage_is_there(kind: str) -> None:
    assert any(kind in case.name for case in catalogue())


def test_every_case_has_its_damage() -> None:
    assert [case.name for case in catalogue()] == list(DAMAGES)


def test_the_sound_model_is_what_its_recipe_gives(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    assert files_of(tmp_path / "hf") == files_of(SOUND / "hf")


def test_every_case_can_be_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_damaged", str(tmp_path / "cases")])
    make_damaged.main()
    made = {path.name for path in (tmp_path / "cases").iterdir()}
    assert made >= {case.name for case in catalogue()} - {"absent"}


def test_the_page_shows_the_catalogue() -> None:
    """`python -m fixtures.make_damaged --docs` writes the table again."""
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_table(text)


def test_another_table_would_be_noticed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text.replace("truncated", "cut", 1)) != text.replace("truncated", "cut", 1)
    assert with_table(f"{BEGIN}{END}").count("\n|") == len(catalogue()) + 2
