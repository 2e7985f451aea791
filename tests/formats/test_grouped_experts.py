"""`GroupedMLP` of megatron-core 0.16: its two matrices are read as the experts that the real module computes with."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.conversion.convert import convert
from ckptkit.dtypes import DTYPES
from ckptkit.errors import InputError
from ckptkit.io.reading import read_tensor
from ckptkit.io.transposed import transposed
from ckptkit.tensors import Tensor
from tests.formats.golden_hf import save_hf
from tests.formats.megatron_ranks import (
    EXPERT_FFN,
    EXPERTS,
    HIDDEN,
    LAYERS,
    Job,
    arguments,
    shard,
    weights,
)
from tests.models import files_of

torch = pytest.importorskip("torch")


def group(rank: int, size: int) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def grouped_mlp(monkeypatch: pytest.MonkeyPatch, rank: int, tp: int, ep_rank: int, ep: int) -> Any:
    """The real module of one rank; only grouped matrix products, which need CUDA, are replaced by single ones."""
    experts = pytest.importorskip("megatron.core.transformer.moe.experts")
    if not hasattr(experts, "GroupedMLP"):
        pytest.skip("megatron-core 0.19 has no GroupedMLP any more")
    from megatron.core.transformer.transformer_config import TransformerConfig

    def gmm(tokens: Any, weight: Any, counts: Any, trans_b: bool) -> Any:
        assert not trans_b
        parts = tokens.split(counts.tolist())
        return torch.cat([part @ one for part, one in zip(parts, weight, strict=True)])

    product = SimpleNamespace(assert_grouped_gemm_is_available=lambda: None, ops=SimpleNamespace(gmm=gmm))
    monkeypatch.setattr(experts, "gg", product)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=EXPERT_FFN,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        bf16=True,
        perform_initialization=False,
    )
    groups = SimpleNamespace(ep=group(ep_rank, ep), expt_tp=group(rank, tp), expt_dp=group(0, 1))
    return experts.GroupedMLP(EXPERTS // ep, config, groups)


def load_experts(module: Any, layer: int, rank: int, tp: int, first: int) -> None:
    """Puts a rank's golden experts into a module by its own rule for distributed checkpoints, which transposes."""
    golden, names = weights("qwen3_moe", "bfloat16"), module.sharded_state_dict()
    count = module.num_local_experts
    for name, kind in (("weight1", "1"), ("weight2", "2")):
        keys = [f"decoder.layers.{layer}.mlp.experts.linear_fc{kind}.weight{first + number}" for number in range(count)]
        whole = torch.stack([shard(key, golden[key], rank, tp) for key in keys])
        parts = list(whole.chunk(2, dim=1)) if kind == "1" else whole
        with torch.no_grad():
            getattr(module, name).copy_(names[name].merge_fn(parts))


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_experts_of_the_real_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tp: int, ep: int) -> None:
    source = save_hf(tmp_path / "hf", "qwen3_moe", "bfloat16")
    golden = weights("qwen3_moe", "bfloat16")
    for rank in range(tp):
        for ep_rank in range(ep):
            model = {
                name: shard(name, values, rank, tp).clone() for name, values in golden.items() if "experts" not in name
            }
            for layer in range(LAYERS):
                module = grouped_mlp(monkeypatch, rank, tp, ep_rank, ep)
                load_experts(module, layer, rank, tp, ep_rank * EXPERTS // ep)
                prefix = f"decoder.layers.{layer}.mlp.experts."
                model.update({prefix + name: value.detach() for name, value in module.named_parameters()})
            args = argparse.Namespace(**arguments(Job("save", "", "qwen3_moe", tp=tp, ep=ep)))
            name = f"mp_rank_{rank:02d}" + (f"_{ep_rank:03d}" if ep > 1 else "")
            (tmp_path / "megatron" / name).mkdir(parents=True)
            torch.save({"args": args, "model": model}, tmp_path / "megatron" / name / "model_optim_rng.pt")
    convert(tmp_path / "megatron", tmp_path / "back", to="hf", hf_reference=source)
    assert files_of(tmp_path / "back") == files_of(source)


def test_the_real_module_computes_with_these_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule for distributed checkpoints, which the test above trusts, agrees with the forward pass."""
    module = grouped_mlp(monkeypatch, 0, 1, 0, 1)
    load_experts(module, 0, 0, 1, 0)
    golden = weights("qwen3_moe", "bfloat16")
    counts = torch.tensor([3, 1, 0, 4])
    tokens = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.compiler.set_stance("force_eager"):  # what it would compile differs by processor, and is kept on disk
        found, _ = module(tokens, counts, torch.ones(8))
    expected = []
    for expert, part in enumerate(tokens.split(counts.tolist())):
        gate, up = golden[f"decoder.layers.0.mlp.experts.linear_fc1.weight{expert}"].chunk(2)
        down = golden[f"decoder.layers.0.mlp.experts.linear_fc2.weight{expert}"]
        expected.append((torch.nn.functional.silu(part @ gate.T) * (part @ up.T)) @ down.T)
    found = found.detach().float()
    assert torch.allclose(found, torch.cat(expected).float(), rtol=0.02, atol=0.02 * float(found.abs().max()))


def save_model(folder: Path, changes: dict[str, Any]) -> Path:
    golden = weights("qwen3_moe")
    model = {name: values for name, values in golden.items() if "experts" not in name}
    model.update({f"decoder.layers.{layer}.mlp.experts.weight1": torch.zeros(32, 128) for layer in range(LAYERS)})
    model.update({f"decoder.layers.{layer}.mlp.experts.weight2": torch.zeros(64, 32) for layer in range(LAYERS)})
    model.update(changes)
    (folder / "mp_rank_00").mkdir(parents=True)
    args = argparse.Namespace(**arguments(Job("save", "", "qwen3_moe")))
    kept = {name: value for name, value in model.items() if value is not None}
    torch.save({"args": args, "model": kept}, folder / "mp_rank_00" / "model_optim_rng.pt")
    return folder


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    source = save_hf(tmp_path / "hf", "qwen3_moe")
    assert open_checkpoint(save_model(tmp_path / "good", {}), hf_reference=source).tensors
    prefix = "decoder.layers.0.mlp."
    cases = {
        r"weight1 is \[32, 130\], which is not 4 experts of 32 hidden over 1 ranks": {
            f"{prefix}experts.weight1": torch.zeros(32, 130)
        },
        r"weight2 is \[32, 64\], which is not 4 experts": {f"{prefix}experts.weight2": torch.zeros(32, 64)},
        r"there is no decoder.layers.0.mlp.router.weight to count them by": {f"{prefix}router.weight": None},
        r"linear_fc2.weight0 is \[32, 8\], the config says \[32, 16\]": {
            f"{prefix}experts.weight2": torch.zeros(32, 32)
        },
    }
    for number, (match, changes) in enumerate(cases.items()):
        path = save_model(tmp_path / str(number), changes)
        with pytest.raises(InputError, match=match) as raised:
            open_checkpoint(path, hf_reference=source)
        assert "\n" not in str(raised.value)


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["F32", "BF16", "U8"]), st.data())
def test_transposing(tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, kind: str, data: Any) -> None:
    import numpy as np

    dtype = DTYPES[kind]
    values = np.random.default_rng(0).integers(0, 256, (rows, columns, dtype.itemsize), dtype=np.uint8)
    file = tmp_path_factory.mktemp("matrix") / "values"
    file.write_bytes(b"??" + values.tobytes())
    swapped = transposed(Tensor.from_file(str(file), 2, dtype, (rows, columns)))
    assert swapped.shape == (columns, rows)
    top = data.draw(st.integers(0, columns))
    left = data.draw(st.integers(0, rows))
    part = swapped.rows(top, columns).cols(left, rows)
    assert read_tensor(part).tobytes() == values.transpose(1, 0, 2)[top:, left:].tobytes()
    with pytest.raises(ValueError, match="only stored matrices"):
        transposed(swapped)
