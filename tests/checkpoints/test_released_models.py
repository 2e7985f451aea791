"""Released models at full size: headers over sparse files, planned in seconds, counted against published figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.dtypes import DTYPES
from ckptkit.families import family_of
from ckptkit.formats.safetensors import build_header
from ckptkit.inspection.summary import inspect
from ckptkit.sharding.grid import Parallelism
from ckptkit.tensors import Tensor

FIXTURE = Path(__file__).parents[2] / "fixtures" / "released_configs.json"
RELEASED: dict[str, dict[str, Any]] = json.loads(FIXTURE.read_text())


def sparse_model(path: Path, raw: dict[str, Any]) -> int:
    """Writes config.json and one sparse safetensors file with a real header; returns the number of tensors."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    family = family_of(raw, path)
    config = family.parse(raw)
    tensors = {
        name: Tensor.full(DTYPES["BF16"], shape) for item in family.items(config) for name, shape in item.parts.items()
    }
    tensors = family.fuse(tensors, config, family.hf_spellings[0].name)
    header = build_header(tensors, {"format": "pt"})
    with (path / "model.safetensors").open("wb") as file:
        file.write(header.raw)
        file.truncate(len(header.raw) + header.data_size)
    return len(tensors)


@pytest.mark.parametrize("name", RELEASED)
def test_full_size_dry_run(tmp_path: Path, name: str) -> None:
    released = RELEASED[name]
    count = sparse_model(tmp_path / "hf", released["config"])
    found = inspect(tmp_path / "hf")
    layers = released["config"]["num_hidden_layers"]
    in_sidecar = 2 * layers if found.family == "apertus" else 0  # two numbers of each activation
    assert (count + in_sidecar, found.parameters + in_sidecar) == (released["tensors"], released["elements"])
    moe = "Moe" in found.architecture or "Mixtral" in found.architecture or "A4B" in name
    grid = Parallelism(2, 1, ep=4) if moe else Parallelism(2 if found.architecture.startswith("Qwen2") else 4)
    result = convert(tmp_path / "hf", tmp_path / "meg", to="torch", grid=grid, dry_run=True)
    stored = sum(file["bytes"] for file in result.files if file["path"].endswith(".pt"))
    assert stored >= 2 * found.parameters
    assert result.coverage["used"] == count
    assert not (tmp_path / "meg").exists()


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("gemma-4-26B-A4B", Parallelism(4, 2, ep=8, etp=1)),  # its global layers have 2 key/value heads
        ("gemma-4-31B", Parallelism(8, 4)),  # 4 of them
        ("gemma-4-E2B", Parallelism(4)),  # one
        ("gemma-4-E4B", Parallelism(2, 3, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("to", ["torch", "torch_dist"])
def test_full_size_dry_run_of_gemma_4_on_other_grids(tmp_path: Path, name: str, grid: Parallelism, to: str) -> None:
    count = sparse_model(tmp_path / "hf", RELEASED[name]["config"])
    result = convert(tmp_path / "hf", tmp_path / "meg", to=to, grid=grid, dry_run=True)
    assert result.coverage["used"] == count and str(grid) in result.target["grid"]
    stored = sum(file["bytes"] for file in result.files if not file["path"].startswith("ckptkit/"))
    assert stored >= 2 * inspect(tmp_path / "hf").parameters
    assert not (tmp_path / "meg").exists()
