"""Models that were tuned differently, as the tests of editing need them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckptkit import Parallelism, convert
from ckptkit.families import family_of


def tuned(base: Path, path: Path, seed: int, *, size: float = 0.3) -> Path:
    """A copy of a model, every number of which is changed: by about a third of its size, and of the tensor's mean."""
    shutil.copytree(base, path)
    generator = torch.Generator().manual_seed(seed)
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        changed = {}
        for name, tensor in load_file(file).items():
            noise = torch.randn(tensor.shape, generator=generator) * size
            moved = tensor.float() * (1 + noise) + noise * tensor.float().abs().mean()
            changed[name] = torch.where(tensor.isfinite(), moved, tensor).to(tensor.dtype)
        save_file(changed, file, metadata=metadata)
    return path


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face directory."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def in_modules(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face directory as the modules of transformers have them: all experts in one tensor."""
    config, found = json.loads((folder / "config.json").read_text()), tensors_of(folder)
    family = family_of(config, folder)
    for spelling in family.hf_spellings:
        if spelling.stacks and not any(".experts.gate_up_proj" in name for name in found):
            model, stacked = family.parse(config), {}
            for layer in (layer for layer, one in enumerate(model.layers) if one.moe):
                for stack in spelling.stacks:
                    experts = [
                        torch.cat([found.pop(part.format(i=layer, e=expert)) for part in stack.parts])
                        for expert in range(model.num_experts)
                    ]
                    stacked[stack.fused.format(i=layer)] = torch.stack(experts)
            return {spelling.written(name): tensor for name, tensor in found.items()} | stacked
    return found


def run_of(models: list[Path], root: Path, to: str, grid: Parallelism, first: int = 1000) -> Path:
    """A Megatron run whose iterations are these models, without a sidecar, as a trainer leaves it."""
    root.mkdir()
    for number, model in enumerate(models, 1):
        convert(model, root / "made", to=to, grid=grid)
        (root / "made" / "release").rename(root / f"iter_{first * number:07d}")
        shutil.rmtree(root / "made")
    (root / "latest_checkpointed_iteration.txt").write_text(str(first * len(models)))
    return root


def ulps(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """The share of elements that are not the nearest number of their type to the exact ones, and the most steps off."""
    nearest = exact.to(found.dtype)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    steps = (found.view(kind).long() - nearest.view(kind).long()).abs()
    steps[found == nearest] = 0
    return (steps > 0).double().mean().item(), float(steps.max())


def each(function: Callable[..., torch.Tensor], *folders: Path) -> dict[str, torch.Tensor]:
    """A function of the float64 tensors of several models, name by name."""
    models: list[dict[str, Any]] = [tensors_of(folder) for folder in folders]
    return {name: function(*(model[name].double() for model in models)) for name in models[0]}
