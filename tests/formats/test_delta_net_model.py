"""megatron-core's own DeltaNets load what `convert` writes, save the same keys, and compute what transformers does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptkit import Parallelism, convert
from tests.formats.delta_net_model import LENGTH
from tests.models import add_prediction, files_of, model_classes, save_model

pytest.importorskip("megatron.core")

NORM_STATES = re.compile(r"missing .*(_layernorm|\.out_norm)\._extra_state")
"""States of Transformer Engine's norms, in whose place the model here has norms of ours."""


def ranks(kind: str, folder: Path, tp: int = 1, pp: int = 1, ep: int = 1) -> list[str]:
    """Runs the ranks of `delta_net_model`, and returns what the model and the checkpoint do not have in common."""
    command = [sys.executable, "-m", "tests.formats.delta_net_model", kind, str(folder)]
    sizes = [str(size) for size in (tp, pp, ep)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([*command, str(rank), *sizes], **pipes, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"})
        for rank in range(tp * pp * ep)
    ]
    told = [process.communicate(timeout=600) for process in started]
    assert all(process.returncode == 0 for process in started), [error[-3000:] for _, error in told]
    return [line for line in told[0][0].splitlines() if line and not NORM_STATES.fullmatch(line)]


def boxes(path: Path) -> dict[str, Any]:
    """Key -> shape of the whole tensor, and places and sizes of its chunks."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(str(path)).read_metadata().state_dict_metadata
    return {
        key: (tuple(tensor.size), sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks))
        for key, tensor in metadata.items()
        if hasattr(tensor, "chunks")
    }


def written(tmp_path: Path, kind: str, grid: Parallelism, *, predicts: bool = False) -> Path:
    source = save_model(tmp_path / "hf", kind)
    if predicts:
        add_prediction(source)
        (tmp_path / "predicts").touch()
    options: dict[str, Any] = {"make_vocab_size_divisible_by": 256 // grid.tp}
    convert(source, tmp_path / "ours", to="torch_dist", grid=grid, **options)
    return source


KIND = "qwen3_next"
GRIDS = [
    Parallelism(),
    Parallelism(2),
    Parallelism(4),
    Parallelism(2, 2),
    Parallelism(1, 2, ep=2),
    Parallelism(2, ep=2),
]


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_model_of_megatron_core_loads_and_saves(tmp_path: Path, grid: Parallelism) -> None:
    source = written(tmp_path, KIND, grid)
    assert ranks(KIND, tmp_path, grid.tp, grid.pp, grid.ep) == []
    assert boxes(tmp_path / "ours" / "release") == boxes(tmp_path / "theirs")
    shutil.copytree(tmp_path / "ours" / "ckptkit", tmp_path / "theirs" / "ckptkit")
    convert(tmp_path / "theirs", tmp_path / "back", to="hf", hf_reference=source)
    assert files_of(tmp_path / "back") == files_of(source)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KIND])
def test_logits_of_megatron_core(tmp_path: Path, kind: str) -> None:
    """Every head, gate, beta and decay is where megatron-core's own code looks for it."""
    import torch

    tokens = torch.randint(0, 250, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    source = written(tmp_path, kind, Parallelism())
    torch.save(tokens, tmp_path / "tokens.pt")
    assert ranks(kind, tmp_path) == []
    with torch.no_grad():
        expected = model_classes(kind)[1].from_pretrained(source, dtype="float32").eval()(tokens).logits
    (found,) = (one[..., : expected.shape[-1]] for one in torch.load(tmp_path / "logits.pt"))
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, error
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.99


def predicted(source: Path, tokens: Any, *, swapped: bool) -> Any:
    """Logits of the layer of multi-token prediction, as vLLM computes them, with layers of transformers.

    Source: `Qwen3NextMultiTokenPredictor.forward` of vLLM.

    Args:
        source: Hugging Face directory.
        tokens: Token ids; behind the end of a row comes token 0.
        swapped: Whether the hidden state comes before the embedding, as it should not.
    """
    import torch
    from safetensors.torch import load_file
    from transformers.models.qwen3_next import modeling_qwen3_next as code

    model = model_classes(KIND)[1].from_pretrained(source, dtype="float32").eval()
    stored = {name: one for name, one in load_file(source / "model.safetensors").items() if name.startswith("mtp.")}
    experts = [f"mtp.layers.0.mlp.experts.{number}." for number in range(model.config.num_experts)]
    gate_up = [torch.cat([stored[f"{one}{part}_proj.weight"] for part in ("gate", "up")]) for one in experts]
    layer = code.Qwen3NextDecoderLayer(model.config, model.config.layer_types.index("full_attention")).eval()
    state = {
        name.removeprefix("mtp.layers.0."): one
        for name, one in stored.items()
        if name.startswith("mtp.layers.0.") and ".experts." not in name
    }
    state["mlp.experts.gate_up_proj"] = torch.stack(gate_up)
    state["mlp.experts.down_proj"] = torch.stack([stored[f"{one}down_proj.weight"] for one in experts])
    layer.load_state_dict(state)

    def norm(name: str, x: Any) -> Any:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=model.config.rms_norm_eps) * (
            1 + stored[f"mtp.{name}.weight"]
        )

    following = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    states = model.model(tokens).last_hidden_state
    halves = [norm("pre_fc_norm_embedding", model.model.embed_tokens(following)), norm("pre_fc_norm_hidden", states)]
    x = torch.cat(halves[::-1] if swapped else halves, dim=-1) @ stored["mtp.fc.weight"].T
    places = torch.arange(tokens.shape[1])[None]
    mask = torch.full((tokens.shape[1], tokens.shape[1]), float("-inf")).triu(1)[None, None]
    out = layer(x, position_embeddings=model.model.rotary_emb(x, places), attention_mask=mask, position_ids=places)
    out = out[0] if isinstance(out, tuple) else out
    return model.lm_head(norm("norm", out))


@pytest.mark.slow
def test_multi_token_prediction_is_copied(tmp_path: Path) -> None:
    """megatron-core's block computes what vLLM's formula does, with the embedding's half of the projection first."""
    import torch

    tokens = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(3))
    source = written(tmp_path, KIND, Parallelism(), predicts=True)
    torch.save(tokens, tmp_path / "tokens.pt")
    assert [line for line in ranks(KIND, tmp_path) if not re.search(r"\.[eh]norm\._extra_state", line)] == []
    assert boxes(tmp_path / "ours" / "release") == boxes(tmp_path / "theirs")
    with torch.no_grad():
        right, wrong = (predicted(source, tokens, swapped=swapped) for swapped in (False, True))
    found, _ = (one[..., : right.shape[-1]] for one in torch.load(tmp_path / "logits.pt"))
    errors = [float((found - one).abs().max() / one.abs().max()) for one in (right, wrong)]
    assert errors[0] < 1e-4 and errors[1] > 0.05, errors
