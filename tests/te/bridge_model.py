"""Megatron-Bridge loads a checkpoint and computes: `python -m tests.te.bridge_model CHECKPOINT EXPECTED MODEL_TYPE`.

Prints a JSON line: how many parameters differ from the checkpoint's, and how far the logits are from the expected ones.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any


def main(checkpoint: str, expected: str, model_type: str) -> None:
    """One rank, on the first GPU; modules are those that Megatron-Bridge takes by itself."""
    warnings.simplefilter("ignore")
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    import torch
    from megatron.bridge.training.model_load_save import load_megatron_model
    from megatron.core import parallel_state, tensor_parallel
    from safetensors.torch import load_file

    torch.cuda.set_device(0)
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(str(Path(folder) / "store"), 1)
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        found = load_megatron_model(checkpoint, **({"model_type": model_type} if model_type else {}))
        model: Any = found[0] if isinstance(found, list) else found
        model = model.cuda().eval()
        content = load_file(expected)
        rows = content["tokens"].cuda()
        positions = torch.arange(rows.size(1), device="cuda")[None].expand(rows.size(0), -1)
        with torch.no_grad():
            logits = model(rows, positions, None)[..., : content["logits"].size(-1)].cpu().double()
        differences = (logits - content["logits"].double()).abs()
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        print(
            json.dumps(
                {
                    "wrong": wrong(checkpoint, state),
                    "parameters": len([*model.parameters()]),
                    "max": differences.max().item() / content["logits"].abs().max().item(),
                    "modules": sorted({type(part).__name__ for part in model.modules() if [*part.parameters(False)]}),
                }
            )
        )
        torch.distributed.destroy_process_group()


def wrong(checkpoint: str, state: dict[str, Any]) -> list[str]:
    """The tensors of the checkpoint that the model does not hold exactly."""
    import torch

    from ckptkit.checkpoints.opening import open_checkpoint
    from ckptkit.sharding.grid import Parallelism

    tensors = open_checkpoint(Path(checkpoint).parent).shard(grid=Parallelism(), tp_rank=0, spec="te")
    assert len(tensors) > 20

    def held(name: str, tensor: Any) -> bool:
        value = state[name].cpu() if name in state else None
        return value is not None and torch.equal(value[: len(tensor)], tensor[: len(value)])

    return [name for name, tensor in tensors.items() if not held(name, tensor)]


if __name__ == "__main__":
    main(*sys.argv[1:4])
