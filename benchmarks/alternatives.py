"""What people do today, as commands of their own: `python -m benchmarks.alternatives NAME SRC DST`.

They are written as users write them, with the libraries' own fast paths (memory-mapped loading, one pass over ranks).
None of them makes its output durable.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TP, PP = 2, 2


def torch_cat(source: Path, out: Path) -> None:
    """`load_file`, `torch.cat` and `torch.save` of every TP2 x PP2 rank."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((source / "config.json").read_text())
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        weights.update(load_file(shard))
    for tp in range(TP):
        for pp in range(PP):
            folder = out / f"mp_rank_{tp:02}_{pp:03}"
            folder.mkdir(parents=True)
            torch.save({"model": dict(_rank(weights, config, tp, pp))}, folder / "model_optim_rng.pt")


def _rank(weights: dict[str, Any], config: dict[str, Any], tp: int, pp: int) -> Iterator[tuple[str, Any]]:
    """Megatron's tensors of one rank."""
    import torch

    groups, depth = config["num_key_value_heads"], config["num_hidden_layers"] // PP
    if pp == 0:
        yield "embedding.word_embeddings.weight", weights["model.embed_tokens.weight"].chunk(TP)[tp].clone()
    for local in range(depth):
        old, new = f"model.layers.{pp * depth + local}.", f"decoder.layers.{local}."
        parts = [weights[f"{old}self_attn.{name}_proj.weight"] for name in "qkv"]
        grouped = [part.view(groups, -1, part.shape[-1]).chunk(TP)[tp] for part in parts]
        qkv = torch.cat(grouped, dim=1).reshape(-1, config["hidden_size"])
        gate, up = (weights[f"{old}mlp.{name}_proj.weight"].chunk(TP)[tp] for name in ("gate", "up"))
        yield f"{new}self_attention.linear_qkv.weight", qkv
        yield (
            f"{new}self_attention.linear_proj.weight",
            weights[f"{old}self_attn.o_proj.weight"].chunk(TP, 1)[tp].clone(),
        )
        yield f"{new}mlp.linear_fc1.weight", torch.cat([gate, up])
        yield f"{new}mlp.linear_fc2.weight", weights[f"{old}mlp.down_proj.weight"].chunk(TP, 1)[tp].clone()
        yield f"{new}self_attention.linear_qkv.layer_norm_weight", weights[f"{old}input_layernorm.weight"].clone()
        yield f"{new}mlp.linear_fc1.layer_norm_weight", weights[f"{old}post_attention_layernorm.weight"].clone()
    if pp == PP - 1:
        yield "decoder.final_layernorm.weight", weights["model.norm.weight"].clone()
        yield "output_layer.weight", weights["lm_head.weight"].chunk(TP)[tp].clone()


def transformers_save(source: Path, out: Path) -> None:
    """`from_pretrained` and `save_pretrained`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(out)


def mergekit_passthrough(source: Path, out: Path) -> None:
    """Its passthrough merge of all layers of one model."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    slices = [{"sources": [{"model": str(source), "layer_range": [0, layers]}]}]
    recipe = yaml.safe_dump({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"})
    options = MergeOptions(copy_tokenizer=False, lazy_unpickle=True)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe)), str(out), options=options)


def peft_merge(source: Path, out: Path, adapter: Path) -> None:
    """`merge_and_unload` and `save_pretrained`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def mergekit_merge(source: Path, out: Path, adapter: Path) -> None:
    """Its passthrough merge of one model with a LoRA, which it merges into a folder of its own first."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    slices = [{"sources": [{"model": f"{source}+{adapter}", "layer_range": [0, layers]}]}]
    recipe = yaml.safe_dump({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"})
    with TemporaryDirectory(dir=out.parent) as cache:
        options = MergeOptions(copy_tokenizer=False, lazy_unpickle=True, lora_merge_cache=cache)
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe)), str(out), options=options)


MERGES = {"peft": peft_merge, "mergekit": mergekit_merge}
"""Merges of an adapter; the command takes its directory, too."""
ALTERNATIVES = {
    "torch-cat": torch_cat,
    "transformers": transformers_save,
    "mergekit": mergekit_passthrough,
}
_NEEDS = {"torch-cat": "torch", "transformers": "transformers", "mergekit": "mergekit"}


def installed(name: str) -> bool:
    """Whether an alternative can be run here."""
    return find_spec(_NEEDS[name]) is not None


def main() -> None:
    """Runs one alternative."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*ALTERNATIVES, *(f"{name}-merge" for name in MERGES)])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("adapter", type=Path, nargs="?")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, arguments.out, ignore_errors=True)
        if arguments.adapter is not None:
            MERGES[arguments.name.removesuffix("-merge")](arguments.source, arguments.out, arguments.adapter)
        else:
            ALTERNATIVES[arguments.name](arguments.source, arguments.out)
        stack.pop_all()  # a failure leaves nothing, a success its output


if __name__ == "__main__":
    main()
