"""Adapters of the tiny models, made by PEFT, with every factor random: B begins as zeros, and zeros hide mistakes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOWERS = r".*(vision|visual|audio|multi_modal_projector|embed_vision|embed_audio|shared_expert_gate).*"
"""Without a linear in Megatron: towers, and the gate of a shared expert, which is one row that no module holds."""


def load(base: Path) -> Any:
    """The model in a Hugging Face directory, in its class of transformers."""
    import transformers

    architecture = transformers.AutoConfig.from_pretrained(base).architectures[0]
    return getattr(transformers, architecture).from_pretrained(base)


def adapted(base: Path, *, seed: int = 1, dtype: str | None = None, **config: Any) -> Any:
    """A PEFT model of a base with a random adapter.

    Args:
        base: Hugging Face directory.
        seed: Of the factors.
        dtype: Element type of the factors and of whatever else is trained; by default the base's.
        config: Arguments of `LoraConfig`; by default rank 4 and alpha 8 for all linear layers of a language model.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    values = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "exclude_modules": TOWERS, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(**values))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
            elif parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
            if dtype is not None and parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def save_adapter(path: Path, base: Path, **config: Any) -> Path:
    """Saves a random adapter of a base (see `adapted`), and returns its directory."""
    model = adapted(base, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


def tensors_of(folder: Path) -> dict[str, Any]:
    """All tensors in the safetensors files of a folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
