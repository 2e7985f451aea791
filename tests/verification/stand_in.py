"""A Megatron checkpoint cut by hand from a Hugging Face Llama, with as little machinery as possible.

It shares no code with the tables and the sharding rules, so it is a second opinion on them; faults are put into its
files. Ranks open it by the name `OPENER`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ckptkit.sharding.grid import Parallelism
from ckptkit.sharding.stages import Stage, split_layers
from ckptkit.tables.model_config import LayerConfig, ModelConfig, Rope

OPENER = "tests.verification.stand_in:open_stand_in"
DIVISIBLE_BY = 16


@dataclass
class StandIn:
    """What the verification needs of an opened checkpoint."""

    path: Path
    config: ModelConfig
    grid: Parallelism
    padded_vocab_size: int
    format: str = "stand-in"

    def shard(
        self, *, grid: Parallelism, pp_rank: int, tp_rank: int, vp_stage: int, spec: str, **unsplit: Any
    ) -> dict[str, Any]:
        from safetensors.torch import load_file

        assert (grid, spec) == (self.grid, "local")
        return load_file(shard_file(self.path, tp_rank, pp_rank, vp_stage))

    def without_prediction(self) -> StandIn:
        return self


def shard_file(path: Path, tp_rank: int = 0, pp_rank: int = 0, vp_stage: int = 0) -> Path:
    return Path(path) / f"tp{tp_rank}_pp{pp_rank}_vp{vp_stage}.safetensors"


def open_stand_in(path: str) -> StandIn:
    raw = json.loads((Path(path) / "model.json").read_text())
    layers = tuple(LayerConfig(**{**layer, "rope": Rope(**layer["rope"])}) for layer in raw["config"]["layers"])
    config = ModelConfig(**{**raw["config"], "layers": layers})
    return StandIn(Path(path), config, Parallelism(**raw["grid"]), raw["padded_vocab_size"])


def write_stand_in(source: Path, target: Path, grid: Parallelism) -> Path:
    """Shards of the Hugging Face directory `source` for every rank of `grid`."""
    from safetensors.torch import load_file, save_file

    config = llama_of(json.loads((source / "config.json").read_text()))
    tensors = load_file(source / "model.safetensors")
    quantum = DIVISIBLE_BY * grid.tp
    padded = -(-config.vocab_size // quantum) * quantum
    target.mkdir(parents=True)
    meta = {"config": asdict(config), "grid": asdict(grid), "padded_vocab_size": padded}
    (target / "model.json").write_text(json.dumps(meta))
    for stage in split_layers(config.num_layers, grid):
        for tp_rank in range(grid.tp):
            chunk = cut(tensors, config, stage, tp_rank, grid.tp, padded)
            save_file(chunk, shard_file(target, tp_rank, stage.pp_rank, stage.vp_stage))
    return target


def llama_of(raw: dict[str, Any]) -> ModelConfig:
    """The config of a Llama that transformers 5 saved."""
    rope = raw["rope_parameters"]
    values = {"theta": rope["rope_theta"], "kind": rope["rope_type"], "factor": rope.get("factor", 1.0)}
    if rope["rope_type"] == "llama3":
        values |= {key: rope[key] for key in ("low_freq_factor", "high_freq_factor")}
        values |= {"original_max_position": rope["original_max_position_embeddings"]}
    sizes = (raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"], raw["intermediate_size"])
    return ModelConfig(
        family="llama",
        architecture="LlamaForCausalLM",
        hidden_size=raw["hidden_size"],
        vocab_size=raw["vocab_size"],
        layers=(LayerConfig(*sizes, Rope(**values)),) * raw["num_hidden_layers"],
        tied=raw["tie_word_embeddings"],
        norm_eps=raw["rms_norm_eps"],
        max_position_embeddings=raw["max_position_embeddings"],
        qkv_bias=raw["attention_bias"],
        out_bias=raw["attention_bias"],
        mlp_bias=raw["mlp_bias"],
        activation=raw["hidden_act"],
    )


def cut(
    tensors: dict[str, Any], config: ModelConfig, stage: Stage, tp_rank: int, tp: int, padded: int
) -> dict[str, Any]:
    """One rank's tensors of one model chunk."""
    import torch

    def column(tensor: Any) -> Any:
        return tensor.chunk(tp, 0)[tp_rank].contiguous()

    def row(tensor: Any) -> Any:
        return tensor.chunk(tp, 1)[tp_rank].contiguous()

    def vocab(tensor: Any) -> Any:
        return column(torch.cat([tensor, torch.zeros(padded - tensor.shape[0], tensor.shape[1])]))

    chunk = {}
    embedding = tensors["model.embed_tokens.weight"]
    if stage.first:
        chunk["embedding.word_embeddings.weight"] = vocab(embedding)
    if stage.last:
        chunk["decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
        if not (config.tied and stage.first):
            chunk["output_layer.weight"] = vocab(embedding if config.tied else tensors["lm_head.weight"])
    for local, number in enumerate(stage.layers):
        old, new = f"model.layers.{number}.", f"decoder.layers.{local}."
        chunk[new + "input_layernorm.weight"] = tensors[old + "input_layernorm.weight"]
        chunk[new + "pre_mlp_layernorm.weight"] = tensors[old + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            if old + f"self_attn.q_proj.{kind}" in tensors:
                parts = [tensors[old + f"self_attn.{part}_proj.{kind}"] for part in "qkv"]
                chunk[new + f"self_attention.linear_qkv.{kind}"] = column(interleave(parts, config.layers[number]))
            if old + f"mlp.gate_proj.{kind}" in tensors:
                halves = [column(tensors[old + f"mlp.{part}_proj.{kind}"]) for part in ("gate", "up")]
                chunk[new + f"mlp.linear_fc1.{kind}"] = torch.cat(halves)
        for theirs, ours in (("self_attn.o_proj", "self_attention.linear_proj"), ("mlp.down_proj", "mlp.linear_fc2")):
            chunk[new + f"{ours}.weight"] = row(tensors[old + f"{theirs}.weight"])
            if old + f"{theirs}.bias" in tensors:
                chunk[new + f"{ours}.bias"] = tensors[old + f"{theirs}.bias"]
    return chunk


def interleave(parts: list[Any], layer: LayerConfig) -> Any:
    """q, k and v, group after group."""
    import torch

    groups = [part.chunk(layer.num_kv_heads) for part in parts]
    return torch.cat([piece for group in zip(*groups, strict=True) for piece in group])


def edit_shard(path: Path, change: Callable[[dict[str, Any]], None], tp_rank: int = 0, pp_rank: int = 0) -> None:
    """Rewrite one shard file after `change` has altered its tensors in place."""
    from safetensors.torch import load_file, save_file

    file = shard_file(path, tp_rank, pp_rank)
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def edit_config(path: Path, change: Callable[[ModelConfig], ModelConfig]) -> None:
    """Rewrite what the checkpoint says of its model."""
    file = path / "model.json"
    config = change(open_stand_in(str(path)).config)
    file.write_text(json.dumps({**json.loads(file.read_text()), "config": asdict(config)}))


def with_rope(config: ModelConfig, **changes: Any) -> ModelConfig:
    """`config` with other rotary embeddings."""
    layers = tuple(replace(layer, rope=replace(layer.rope, **changes)) for layer in config.layers)
    return replace(config, layers=layers)
