"""A rank that shards a Hugging Face model with FSDP and saves it, as verl does or with torch.distributed.checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.formats.rank_pool import incoming

MODULE = "tests.formats.trainer_states.fsdp_ranks"


def main() -> None:
    """Answers the jobs of the pool; torch and transformers are imported once."""
    import torch
    import transformers  # noqa: F401

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rank = int(sys.argv[1])
    for job, store_path in incoming():
        store = torch.distributed.FileStore(store_path, job["world_size"])
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=job["world_size"])
        try:
            ACTIONS[job["save"]](job, rank, SHARDINGS[job["sharding"]](_model(job), job))
            torch.distributed.barrier()
        finally:
            torch.distributed.destroy_process_group()


def _model(job: dict[str, Any]) -> Any:
    """The model with every parameter as it is stored, and a buffer-free state dict."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    auto = AutoModelForTokenClassification if job.get("critic") else AutoModelForCausalLM
    model = auto.from_pretrained(job["hf"], dtype="auto")
    return _adapted(model, job["adapter"]) if "adapter" in job else model


def _adapted(model: Any, adapter: str) -> Any:
    """The model inside PEFT's, as verl trains it: factors in the type of the weights, because FSDP wants one type."""
    from peft import PeftModel

    dtype = next(model.parameters()).dtype
    adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    for parameter in adapted.parameters():
        parameter.data = parameter.data.to(dtype)
    return adapted


def _mesh(*shape: int, names: tuple[str, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _layers(model: Any) -> Any:
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    return getattr(model.model, "language_model", model.model).layers


def _fsdp2(model: Any, mesh: Any, dim: int | None = None) -> Any:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    place = None if dim is None else lambda parameter: Shard(min(dim, parameter.ndim - 1))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    return fully_shard(model, mesh=mesh, shard_placement_fn=place)


def _flat(model: Any, job: dict[str, Any]) -> Any:
    return _fsdp2(model, _mesh(job["world_size"], names=("fsdp",)))


def _columns(model: Any, job: dict[str, Any]) -> Any:
    return _fsdp2(model, _mesh(job["world_size"], names=("fsdp",)), dim=1)


def _hybrid(model: Any, job: dict[str, Any]) -> Any:
    return _fsdp2(model, _mesh(2, job["world_size"] // 2, names=("ddp", "fsdp")))


def _with_tp(model: Any, job: dict[str, Any]) -> Any:
    """FSDP2 over ranks that already split the linear layers: the placement that torch calls strided."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = _mesh(2, job["world_size"] // 2, names=("fsdp", "tp"))
    plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in _layers(model):
        parallelize_module(layer, mesh["tp"], plan)
    return _fsdp2(model, mesh["fsdp"])


def _fsdp1(model: Any, job: dict[str, Any], mesh: Any, strategy: str) -> Any:
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType
    from torch.distributed.fsdp.api import ShardedStateDictConfig
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    wrapped = FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy[strategy],
        auto_wrap_policy=ModuleWrapPolicy({type(_layers(model)[0])}),
        use_orig_params=job.get("use_orig_params", False),
    )
    config = ShardedStateDictConfig(offload_to_cpu=True)
    FullyShardedDataParallel.set_state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT, config)
    return wrapped


def _fsdp1_mesh(model: Any, job: dict[str, Any]) -> Any:
    return _fsdp1(model, job, _mesh(job["world_size"], names=("fsdp",)), "FULL_SHARD")


def _fsdp1_hybrid(model: Any, job: dict[str, Any]) -> Any:
    return _fsdp1(model, job, _mesh(2, job["world_size"] // 2, names=("ddp", "fsdp")), "HYBRID_SHARD")


def _fsdp1_sharded(model: Any, job: dict[str, Any]) -> Any:
    """Without a device mesh, FSDP1 makes `ShardedTensor`s."""
    return _fsdp1(model, job, None, "FULL_SHARD")


def _verl(job: dict[str, Any], rank: int, model: Any) -> None:
    """What `FSDPCheckpointManager.save_checkpoint` of verl leaves in an `actor` folder."""
    import torch

    actor = Path(job["out"])
    (actor / "huggingface").mkdir(parents=True, exist_ok=True)
    ending = f"world_size_{job['world_size']}_rank_{rank}.pt"
    state = model.state_dict()
    if job.get("lora_only"):
        state = {key: value for key, value in state.items() if "lora_" in key or ".adapter_" in key}
    torch.save(state, actor / f"model_{ending}")
    torch.save({"state": {}, "param_groups": []}, actor / f"optim_{ending}")
    torch.save(
        {"lr_scheduler": {"last_epoch": 3}, "rng": {"cpu": torch.get_rng_state()}}, actor / f"extra_state_{ending}"
    )
    if rank == 0:
        (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": job["world_size"]}))
        for name in ("config.json", "generation_config.json"):
            if (source := Path(job["hf"]) / name).is_file():
                shutil.copy(source, actor / "huggingface" / name)
        if "adapter" in job:
            (actor / "lora_train_meta.json").write_text(json.dumps(_lora_train_meta(model), indent=4))


def _lora_train_meta(model: Any) -> dict[str, Any]:
    """What `FSDPCheckpointManager._get_lora_train_meta` of verl keeps of PEFT's config."""
    config = getattr(model, "_fsdp_wrapped_module", model).peft_config["default"]
    return {"r": int(config.r), "lora_alpha": int(config.lora_alpha), "task_type": "CAUSAL_LM"}


def _dcp(job: dict[str, Any], rank: int, model: Any) -> None:
    """Model and optimizer in one distributed checkpoint; the optimizer has made a step, so it has a state."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    state: dict[str, Any] = get_model_state_dict(model)
    for name in reversed(job.get("under", [])):
        state = {name: state}
    if job.get("optimizer"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state["optim"] = get_optimizer_state_dict(model, optimizer)
        state["step"] = 7
    dcp.save(state, checkpoint_id=job["out"])


SHARDINGS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "flat": _flat,
    "columns": _columns,
    "hybrid": _hybrid,
    "with tp": _with_tp,
    "fsdp1 mesh": _fsdp1_mesh,
    "fsdp1 hybrid": _fsdp1_hybrid,
    "fsdp1 sharded": _fsdp1_sharded,
    "none": lambda model, job: model,
}
ACTIONS: dict[str, Callable[[dict[str, Any], int, Any], None]] = {"verl": _verl, "dcp": _dcp}


if __name__ == "__main__":
    main()
