"""verl's own parallel Llama and Qwen2: written and read, against shards made with torch by the rule of its loader."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, open_checkpoint
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.inspection.differences import diff
from ckptkit.sharding.grid import Parallelism
from tests.models import LLAMAS, save_llama, save_model

KINDS = ["mqa", "qwen2-tied", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gqa", "qwen2"))]
GRIDS = [Parallelism(), Parallelism(2, 2), Parallelism(4), Parallelism(12, 2), Parallelism(2, 2, 2)]
"""12 heads over 4 key/value heads, so that from 12 ranks three share one."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def get(kind: str) -> Path:
        if not (folder / kind).exists():
            (save_llama if kind in LLAMAS else save_model)(folder / kind, kind, dtype="bfloat16", vocab_size=252)
        return folder / kind

    return get


def loaded_by_verl(folder: Path, grid: Parallelism) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """(pp_rank, tp_rank) -> chunks: what `load_state_dict_to_megatron_llama` copies into the module of each rank."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    width, layers = 8, 4
    kv_heads = weights["model.layers.0.self_attn.k_proj.weight"].shape[0] // width
    per_chunk = layers // grid.pp // grid.vpp

    def chunk(tp: int, pp: int, vpp: int) -> dict[str, Any]:
        found = {}

        def cut(name: str, new: str, dim: int = 0) -> None:
            found[new] = weights[name].chunk(grid.tp, dim)[tp].clone()

        def qkv(old: str, new: str, ending: str) -> None:
            query, key, value = (weights[f"{old}.{part}_proj.{ending}"] for part in "qkv")
            narrow = max(kv_heads // grid.tp, 1) * width
            start = tp * narrow if kv_heads >= grid.tp else tp * kv_heads // grid.tp * width
            parts = [query.chunk(grid.tp)[tp], key[start : start + narrow], value[start : start + narrow]]
            found[f"{new}.qkv_proj.{ending}"] = torch.cat(parts)

        if (pp, vpp) == (0, 0):
            cut("model.embed_tokens.weight", "model.embed_tokens.weight")
        for local in range(per_chunk):
            old = f"model.layers.{vpp * (layers // grid.vpp) + pp * per_chunk + local}"
            new = f"model.layers.{local}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{new}.{norm}.weight"] = weights[f"{old}.{norm}.weight"].clone()
            for ending in ("weight", "bias"):
                if f"{old}.self_attn.q_proj.{ending}" in weights:
                    qkv(f"{old}.self_attn", f"{new}.self_attn", ending)
            cut(f"{old}.self_attn.o_proj.weight", f"{new}.self_attn.o_proj.weight", 1)
            halves = [weights[f"{old}.mlp.{part}_proj.weight"].chunk(grid.tp)[tp] for part in ("gate", "up")]
            found[f"{new}.mlp.gate_up_proj.weight"] = torch.cat(halves)
            cut(f"{old}.mlp.down_proj.weight", f"{new}.mlp.down_proj.weight", 1)
        if (pp, vpp) == (grid.pp - 1, grid.vpp - 1):
            found["model.norm.weight"] = weights["model.norm.weight"].clone()
            tied = "lm_head.weight" not in weights
            if not tied or grid.pp > 1:
                cut("model.embed_tokens.weight" if tied else "lm_head.weight", "lm_head.weight")
        return found

    return {(pp, tp): [chunk(tp, pp, vpp) for vpp in range(grid.vpp)] for pp in range(grid.pp) for tp in range(grid.tp)}


def rank_name(tp: int, pp: int, grid: Parallelism) -> str:
    return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if grid.pp > 1 else "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_written_as_its_loader_would_have_it(models: Any, tmp_path: Path, kind: str, grid: Parallelism) -> None:
    import torch

    convert(models(kind), tmp_path / "out", to="torch", grid=grid, spec="verl")
    for (pp, tp), chunks in loaded_by_verl(models(kind), grid).items():
        file = tmp_path / "out" / "release" / rank_name(tp, pp, grid) / "model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        for number, expected in enumerate(chunks):
            found = content["model" if grid.vpp == 1 else f"model{number}"]
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_back_byte_for_byte(models: Any, tmp_path: Path, kind: str, grid: Parallelism) -> None:
    """Also into Megatron's layout, the same as directly; and without the sidecar, recognised by its names."""
    source = models(kind)
    convert(source, tmp_path / "out", to="torch", grid=grid, spec="verl")
    convert(tmp_path / "out", tmp_path / "back", to="hf")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "ckptkit")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (checkpoint.spelling.name, checkpoint.config.vocab_size) == ("verl", 252)
    assert diff(source, tmp_path / "out").same
    replicated = max(grid.tp - checkpoint.config.layers[0].num_kv_heads, 0) * 2 * 4
    biases = 2 if checkpoint.config.qkv_bias else 1
    shared = [comparison for comparison in checkpoint.comparisons if "share heads" in comparison.what]
    assert len(shared) == replicated * biases


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_its_folders(models: Any, tmp_path: Path, grid: Parallelism) -> None:
    """Until 0.4: a list of the chunks' state dicts in `model/mp_rank_TT[_PPP]/model.pt`, config in `huggingface/`."""
    import torch

    actor = tmp_path / "global_step_3" / "actor"
    for (pp, tp), chunks in loaded_by_verl(models("gqa"), grid).items():
        folder = actor / "model" / rank_name(tp, pp, grid)
        folder.mkdir(parents=True)
        torch.save(chunks, folder / "model.pt")
    (actor / "huggingface").mkdir()
    shutil.copy(models("gqa") / "config.json", actor / "huggingface")
    assert diff(models("gqa"), actor).same
    convert(actor, tmp_path / "back", to="hf")
    assert diff(models("gqa"), tmp_path / "back").same
    torch.save({}, next(actor.rglob("model.pt")))
    with pytest.raises(InputError, match="not a list of model chunks"):
        open_checkpoint(actor)


@pytest.mark.parametrize("part", ["key", "value"])
def test_copies_of_heads_that_differ(models: Any, tmp_path: Path, part: str) -> None:
    import torch

    convert(models("mqa"), tmp_path / "out", to="torch", grid=Parallelism(2), spec="verl")
    file = tmp_path / "out" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    rows = content["model"]["model.layers.2.self_attn.qkv_proj.weight"]
    rows[-1 if part == "value" else -9, 5] += 1
    torch.save(content, file)
    with pytest.raises(InputError, match=r"layers\.2\..*linear_qkv\.weight on ranks that share heads"):
        convert(tmp_path / "out", tmp_path / "back", to="hf")
    assert not (tmp_path / "back").exists()


def test_a_shard_of_another_size(models: Any, tmp_path: Path) -> None:
    import torch

    convert(models("gqa"), tmp_path / "out", to="torch", grid=Parallelism(2), spec="verl")
    file = tmp_path / "out" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    name = "model.layers.2.self_attn.qkv_proj.weight"
    content["model"][name] = content["model"][name][:-1].clone()
    torch.save(content, file)
    with pytest.raises(InputError, match=r"linear_qkv\.weight: its shards do not fit together \(a shard is \[79, 96\]"):
        open_checkpoint(tmp_path / "out")


def test_what_it_has_not(models: Any, tmp_path: Path) -> None:
    def attempt(kind: str, **options: Any) -> None:
        convert(models(kind), tmp_path / "out", **{"to": "torch", "spec": "verl", **options})

    for to in ("packed", "torch_dist"):
        with pytest.raises(UsageError, match="--spec verl exists only as per-rank files; use --to torch"):
            attempt("gqa", to=to)
    with pytest.raises(UsageError, match="does not pad the vocabulary"):
        attempt("gqa", make_vocab_size_divisible_by=128)
    save_llama(tmp_path / "odd", "mqa", vocab_size=250)
    with pytest.raises(UsageError, match="a vocabulary of 250 does not divide over --tp 4"):
        convert(tmp_path / "odd", tmp_path / "out", to="torch", spec="verl", grid=Parallelism(4))
    with pytest.raises((UsageError, UnsupportedError), match="has no spec 'verl'"):
        attempt("qwen3")
    assert not (tmp_path / "out").exists()


def test_one_rank_at_a_time(models: Any) -> None:
    import torch

    found = open_checkpoint(models("gqa")).shard(tp_rank=3, tp=4, spec="verl")
    (expected,) = loaded_by_verl(models("gqa"), Parallelism(4))[0, 3]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
