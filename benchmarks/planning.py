"""The cost of a plan: user CPU seconds and peak memory of `ckptkit convert --dry-run` on models with experts.

The sources have true names, shapes and headers, and no weights: their files are sparse, so that a model of 470 GB takes
no room. A dry run reads nothing else.

    python -m benchmarks.planning                    # Qwen3-30B-A3B and Qwen3-235B-A22B to every format
    python -m benchmarks.planning --curve            # from 1,000 to 210,000 tensors
    python -m benchmarks.planning --large            # DeepSeek-V3, Kimi-K2 and GLM on grids that trainings use
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ckptkit.dtypes import DTYPES
from ckptkit.families import family_of
from ckptkit.formats.hf import INDEX
from ckptkit.formats.safetensors import build_header
from ckptkit.sharding.grid import Parallelism
from ckptkit.tensors import Tensor

SHARD = 4_000_000_000
FIXTURE = Path(__file__).parents[1] / "fixtures" / "large_models.json"
"""Configs of large models, each with its origin."""
COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect",),
    "hf": ("convert", "--to", "hf", "--shard-size", "5GB"),
    "packed": ("convert", "--to", "packed"),
    "torch": ("convert", "--to", "torch"),
    "torch_dist": ("convert", "--to", "torch_dist"),
}
ON_GRIDS = ("torch", "torch_dist")
GRID = Parallelism(8, 2, ep=8)


@dataclass(frozen=True)
class Experts:
    """The sizes of a Qwen3-MoE. Numbers of elements."""

    name: str
    layers: int
    experts: int
    hidden: int
    ffn: int
    heads: int
    groups: int = 4
    head_dim: int = 128
    vocab: int = 151936
    parallelism: Parallelism = GRID

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the model."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            yield from self._layer(f"model.layers.{layer}")
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def _layer(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        q, kv = self.heads * self.head_dim, self.groups * self.head_dim
        yield f"{prefix}.self_attn.q_proj.weight", (q, self.hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv, self.hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv, self.hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, q)
        yield f"{prefix}.self_attn.q_norm.weight", (self.head_dim,)
        yield f"{prefix}.self_attn.k_norm.weight", (self.head_dim,)
        yield f"{prefix}.mlp.gate.weight", (self.experts, self.hidden)
        for expert in range(self.experts):
            yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", (self.ffn, self.hidden)
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", (self.ffn, self.hidden)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (self.hidden, self.ffn)
        yield f"{prefix}.input_layernorm.weight", (self.hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)

    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "moe_intermediate_size": self.ffn,
            "num_experts": self.experts,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
        }


@dataclass(frozen=True)
class Listed:
    """A model by its config.json: its tensors are those of its family's table, multi-token prediction included."""

    name: str
    raw: dict[str, Any]
    parallelism: Parallelism

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the model; then the copies that its files hold."""
        family = family_of(self.raw, self.name)
        config = replace(family.parse(self.raw), mtp_layers=self.predicted)
        parts = {
            name: Tensor.full(DTYPES["BF16"], shape)
            for item in family.items(config)
            for name, shape in item.parts.items()
        }
        for name, tensor in family.fuse(parts, config, family.hf_spellings[0].name).items():
            yield name, tensor.shape
        for copy in family.copies(config):
            if copy.hf != "lm_head.weight":
                yield copy.hf, (config.vocab_size, config.hidden_size)

    @property
    def predicted(self) -> int:
        """Layers of multi-token prediction."""
        text = self.raw.get("text_config") or self.raw
        count: int = text.get("num_nextn_predict_layers", text.get("mtp_num_hidden_layers", 0))
        return count

    def config(self) -> dict[str, object]:
        """config.json."""
        return self.raw


def large_models() -> Iterator[Listed]:
    """The models of the fixture, on grids of the sizes that trainings use."""
    grids = {
        "DeepSeek-V3": Parallelism(8, 16, ep=32, etp=1, first_stage_layers=3, last_stage_layers=2),
        "Kimi-K2": Parallelism(8, 16, ep=32, etp=1, first_stage_layers=3, last_stage_layers=2),
        "Moonlight-16B-A3B": Parallelism(4, 1, ep=8, etp=1),
        "GLM-4.5": Parallelism(8, 4, ep=16, etp=1),
        "GLM-4.5-Air": Parallelism(4, 2, ep=8, etp=1),
        "GLM-4.7-Flash": Parallelism(4, 1, ep=8, etp=1),
        "gpt-oss-20b": Parallelism(4, 2, ep=8, etp=1),
        "gpt-oss-120b": Parallelism(8, 4, ep=16, etp=1),
        "Qwen3-Next-80B-A3B": Parallelism(2, 4, ep=8, etp=1),
        "Qwen3.5-35B-A3B": Parallelism(2, 2, ep=8, etp=1),
        "Qwen3.5-397B-A17B": Parallelism(2, 4, ep=32, etp=1),
    }
    for name, model in json.loads(FIXTURE.read_text(encoding="utf-8")).items():
        yield Listed(name, model["config"], grids[name])


MODELS = (
    Experts("Qwen3-30B-A3B", 48, 128, 2048, 768, 32),
    Experts("Qwen3-235B-A22B", 94, 128, 4096, 1536, 64),
)
CURVE = ((32, 8), (128, 24), (128, 128), (128, 256), (128, 544))
"""Layers and experts of models with 1,000 to 210,000 tensors, the number of Kimi-K2-Thinking."""


def write_sparse(path: Path, model: Experts | Listed) -> int:
    """Writes a Hugging Face directory without weights, and gives the number of its tensors."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(model.config(), indent=2) + "\n", encoding="utf-8")
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(_shards(model), 1):
        name = f"model-{number:05}.safetensors"
        header = build_header(tensors, {"format": "pt"})
        with (path / name).open("wb") as file:
            file.write(header.raw)
            file.truncate(len(header.raw) + header.data_size)
        weight_map.update(dict.fromkeys(tensors, name))
        total += header.data_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
    return len(weight_map)


def _shards(model: Experts | Listed) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, shape in model.tensors():
        shard[name] = Tensor.full(DTYPES["BF16"], shape)
        size += shard[name].nbytes
        if size >= SHARD:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def flags(grid: Parallelism) -> tuple[str, ...]:
    """A grid as options."""
    stages = {"first": grid.first_stage_layers, "last": grid.last_stage_layers}
    uneven = [(f"--decoder-{where}-pipeline-num-layers", str(count)) for where, count in stages.items() if count]
    experts = ("--ep", str(grid.ep)) + (("--etp", str(grid.etp)) if grid.etp is not None else ())
    return ("--tp", str(grid.tp), "--pp", str(grid.pp), *experts, *chain.from_iterable(uneven))


def measure(command: Sequence[str], source: Path, out: Path) -> tuple[float, float]:
    """User CPU seconds and peak MiB of one command line."""
    arguments = [sys.executable, "-m", "ckptkit", command[0], str(source)]
    if command[0] == "convert":
        arguments += [str(out), *command[1:], "--dry-run"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # A wrapper, because the peak of RUSAGE_CHILDREN is that of the largest child so far.
    report = "import os,resource,sys;os.spawnvp(os.P_WAIT,sys.argv[1],sys.argv[1:]);"
    report += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", report, *arguments], env={**os.environ}, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime, int(done.stderr.split()[-1]) / 1024


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", action="store_true", help="models from 1,000 to 210,000 tensors")
    parser.add_argument("--large", action="store_true", help="DeepSeek-V3, Kimi-K2, GLM-4.5 and smaller ones")
    parser.add_argument("--only", choices=COMMANDS, nargs="*", default=list(COMMANDS))
    options = parser.parse_args()
    curve = (
        Experts(f"{layers} layers, {experts} experts", layers, experts, 2048, 768, 32) for layers, experts in CURVE
    )
    models = curve if options.curve else large_models() if options.large else MODELS
    print("| model | tensors | command | user CPU s | peak MiB |\n|---|---|---|---|---|")
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            count = write_sparse(Path(folder, "hf"), model)
            for name in options.only:
                command = (*COMMANDS[name], *(flags(model.parallelism) if name in ON_GRIDS else ()))
                cpu, peak = measure(command, Path(folder, "hf"), Path(folder, "out"))
                print(f"| {model.name} | {count:,} | {name} | {cpu:.1f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
