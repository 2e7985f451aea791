"""Files of a run that goes backwards: one folder for what it computes.

- `gradients/`, and after steps `updates/`, what they added to the weights. transformers writes `model.safetensors`,
  under the names that its model has in memory; every rank `<pp>.<tp>.<ep>.<vp>.safetensors`, under Megatron's names;
- `routing/<step>/`: what routers chose in a step (`routing.Record`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ckptkit.formats.safetensors import read_header, tensors_of
from ckptkit.sharding.grid import Rank
from ckptkit.tensors import Tensor

if TYPE_CHECKING:
    import torch

GRADIENTS, UPDATES = "gradients", "updates"
WHOLE = "model.safetensors"


def routing_of(folder: str | Path, step: int) -> Path:
    """Where the routing of a step is."""
    return Path(folder) / "routing" / str(step)


def chunk_file(rank: Rank, vp_stage: int) -> str:
    """Name of the file of a rank's chunk."""
    return f"{rank.pp}.{rank.tp}.{rank.ep}.{vp_stage}.safetensors"


def write(folder: str | Path, kind: str, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes gradients or updates."""
    from safetensors.torch import save_file

    place = Path(folder) / kind
    place.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}, str(place / name))


def read(folder: str | Path, kind: str, name: str) -> dict[str, Tensor]:
    """What was written, as recipes: nothing is loaded."""
    path = Path(folder) / kind / name
    return tensors_of(path, read_header(path))
