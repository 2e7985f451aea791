"""`split-llama build`: whose bytes go where, what is made, what is refused, and that nothing is left half done."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.cli import app as cli
from ckptkit.cli.exits import how_to_resume
from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, StorageError, UnsupportedError, UsageError
from ckptkit.io import faults
from ckptkit.sharding.grid import Parallelism
from ckptkit.surgery.build import SplitRecipe, build, read_schema
from tests.checkpoints.test_released_models import RELEASED, sparse_model
from tests.models import files_of, save_model
from tests.surgery.pairs import FIRST, KINDS, LAST, NARROW, NUM_FIRST, NUM_LAST, WIDE, build_split, recipe, save_half

WEIGHTS = "model.safetensors"


def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of `ckptkit split-llama build`."""
    result = CliRunner().invoke(cli.app, ["split-llama", "build", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout)


def options(pair: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    numbers = ["--num-layers-8", str(NUM_FIRST), "--num-layers-70", str(NUM_LAST)]
    return [str(pair[0]), str(pair[1]), "-o", str(out), *numbers, *more]


def tokenizer(path: Path, **changes: Any) -> Path:
    """Puts a tokenizer.json of 250 tokens into a model's directory."""
    content = {
        "added_tokens": [{"id": 249, "content": "<end>"}],
        "model": {"type": "BPE", "vocab": {f"t{number}": number for number in range(249)}, "merges": ["t 1", "t 2"]},
    }
    (path / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_whose_bytes_go_where(pair: tuple[Path, Path], splits: dict[str, Path], kind: str) -> None:
    first, last = (load_file(path / WEIGHTS) for path in pair)
    built = load_file(splits[kind] / WEIGHTS)
    adapter = {"linear": ["adapter.weight"]}.get(kind, ["adapter_linear_1.weight", "adapter_linear_2.weight"])
    expected = {"model.embed_tokens.weight": first["model.embed_tokens.weight"]}
    expected |= {name: last[name] for name in ("model.norm.weight", "lm_head.weight")}
    for name, tensor in first.items():
        if name.startswith(("model.layers.0.", "model.layers.1.")):
            expected[name.replace("model.layers.", "model.layers_first.")] = tensor
    for number in range(NUM_LAST):
        prefix = f"model.layers.{LAST['num_hidden_layers'] - NUM_LAST + number}."
        for name, tensor in last.items():
            if name.startswith(prefix):
                expected[name.replace(prefix, f"model.layers_last.{number}.")] = tensor
    assert built.keys() == expected.keys() | {f"model.{name}" for name in adapter}
    assert all(torch.equal(built[name], tensor) for name, tensor in expected.items())
    shapes = [tuple(built[f"model.{name}"].shape) for name in adapter]
    assert shapes == [(WIDE, NARROW), (WIDE, WIDE)][: len(adapter)]
    assert all(built[f"model.{name}"].dtype == torch.bfloat16 for name in adapter)


def test_the_result_says_what_happened(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    code, result = run(*options(pair, tmp_path / "split", "--seed", "3", "--adapter", "mlp", "--hash"))
    assert code == 0
    made = 2 * WIDE * (NARROW + WIDE)
    assert result["coverage"] == {"copied": 3 + 6 * 5, "made": 2, "left behind": 6 * 4 + 3}
    assert made <= result["bytes_rearranged"] < made + 20_000 < result["bytes_through"]
    assert any("the adapter is random (kaiming, seed 3)" in note for note in result["notes"])
    assert any("could not be compared" in note for note in result["notes"])
    stored = json.loads((tmp_path / "split" / "config.json").read_text())["split_recipe"]
    assert stored == result["source"]["recipe"]
    assert stored["adapter_init"] == {"name": "kaiming", "seed": 3}
    assert (stored["first"]["layers"], stored["first"]["of_layers"]) == ([0, 2], 4)
    assert (stored["last"]["layers"], stored["last"]["of_layers"]) == ([2, 5], 5)
    assert set(result["hashes"]) == {file["path"] for file in result["files"]}


def test_equal_requests_give_equal_bytes(tmp_path: Path, pair: tuple[Path, Path], splits: dict[str, Path]) -> None:
    for threads in (1, 3):
        build(recipe(pair, "mlp"), tmp_path / str(threads), threads=threads)
        assert files_of(tmp_path / str(threads)) == files_of(splits["mlp"])
    other = load_file(build_split(tmp_path / "other", pair, "mlp", seed=1) / WEIGHTS)
    same = load_file(splits["mlp"] / WEIGHTS)
    changed = {name for name in same if not torch.equal(same[name], other[name])}
    assert changed == {"model.adapter_linear_1.weight", "model.adapter_linear_2.weight"}


@pytest.mark.parametrize("init", ["orthogonal", "identity-pad"])
def test_the_three_kinds_start_as_the_same_map(tmp_path: Path, wide_pair: tuple[Path, Path], init: str) -> None:
    stored = {kind: load_file(build_split(tmp_path / kind, wide_pair, kind, init=init) / WEIGHTS) for kind in KINDS}
    linear = stored["linear"]["model.adapter.weight"]
    assert torch.allclose(linear.T @ linear, torch.eye(NARROW), atol=1e-5)
    assert torch.equal(linear[:NARROW], torch.eye(NARROW)) == (init == "identity-pad")
    x = torch.randn(7, NARROW, generator=torch.Generator().manual_seed(0))
    for kind in ("two-linear", "mlp"):
        inside = x @ stored[kind]["model.adapter_linear_1.weight"].T
        inside = inside.relu() if kind == "mlp" else inside
        assert torch.allclose(inside @ stored[kind]["model.adapter_linear_2.weight"].T, x @ linear.T, atol=1e-5)


def test_an_adapter_from_a_file(tmp_path: Path, pair: tuple[Path, Path], splits: dict[str, Path]) -> None:
    linear = torch.randn(WIDE, NARROW, generator=torch.Generator().manual_seed(0))
    save_file({"adapter.weight": linear, "other": torch.ones(2)}, tmp_path / "linear.safetensors")
    init = f"file:{tmp_path / 'linear.safetensors'}"
    stored = {kind: load_file(build_split(tmp_path / kind, pair, kind, init=init) / WEIGHTS) for kind in KINDS}
    rounded = linear.bfloat16()
    assert torch.equal(stored["linear"]["model.adapter.weight"], rounded)
    assert torch.equal(stored["two-linear"]["model.adapter_linear_1.weight"], rounded)
    assert torch.equal(stored["mlp"]["model.adapter_linear_2.weight"], torch.cat((rounded, -rounded), 1))
    again = build_split(tmp_path / "again", pair, "mlp", init=f"file:{splits['mlp'] / WEIGHTS}")
    assert (again / WEIGHTS).read_bytes() == (splits["mlp"] / WEIGHTS).read_bytes()
    told = json.loads((again / "config.json").read_text())["split_recipe"]["adapter_init"]
    assert told["name"] == "file" and set(told["sha256"]) == {f"model.adapter_linear_{n}.weight" for n in (1, 2)}


def test_sources_of_any_format(tmp_path: Path, pair: tuple[Path, Path], splits: dict[str, Path]) -> None:
    convert(pair[0], tmp_path / "first", to="torch", grid=Parallelism(2, 2))
    convert(pair[1], tmp_path / "last", to="torch_dist", grid=Parallelism(2))
    built = build_split(tmp_path / "split", (tmp_path / "first", tmp_path / "last"))
    ours, other = load_file(built / WEIGHTS), load_file(splits["linear"] / WEIGHTS)
    assert ours.keys() == other.keys() and all(torch.equal(ours[name], other[name]) for name in ours)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    """Also of a narrow model that is tied: its head is left behind, and nothing is tied any more."""
    pair = (
        save_half(tmp_path / "first", FIRST, 1, tie_word_embeddings=True),
        save_half(tmp_path / "last", LAST, 2, tie_word_embeddings=True),
    )
    built = load_file(build_split(tmp_path / "split", pair) / WEIGHTS)
    first, last = (load_file(path / WEIGHTS) for path in pair)
    assert torch.equal(built["lm_head.weight"], last["model.embed_tokens.weight"])
    assert torch.equal(built["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert not open_checkpoint(tmp_path / "split").config.tied


def test_the_tokenizer_comes_from_the_first(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    first, last = save_half(tmp_path / "first", FIRST, 1), save_half(tmp_path / "last", LAST, 2)
    tokenizer(first)
    tokenizer(
        last, model={**json.loads((first / "tokenizer.json").read_text())["model"], "merges": [["t", "1"], ["t", "2"]]}
    )
    (first / "README.md").write_text("about the narrow model")
    built = build_split(tmp_path / "split", (first, last))
    assert (built / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert not (built / "README.md").exists()
    assert (built / "generation_config.json").is_file()


def test_stopped_and_resumed(tmp_path: Path, pair: tuple[Path, Path], splits: dict[str, Path]) -> None:
    out = tmp_path / "split"
    with faults.inject("enospc:200000"), pytest.raises(StorageError):
        build(recipe(pair, "mlp"), out, shard_size=100_000)
    assert not out.exists()
    build(recipe(pair, "mlp"), out, shard_size=100_000, resume=True)
    build(recipe(pair, "mlp"), tmp_path / "whole", shard_size=100_000)
    assert files_of(out) == files_of(tmp_path / "whole")
    with pytest.raises(UsageError, match="the destination exists"):
        build(recipe(pair, "mlp"), out)
    build(recipe(pair, "mlp"), out, overwrite=True)
    assert files_of(out) == files_of(splits["mlp"])


def test_a_build_of_another_seed_does_not_go_on(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    with faults.inject("enospc:200000"), pytest.raises(StorageError):
        build(recipe(pair, seed=1), tmp_path / "split", shard_size=100_000)
    with pytest.raises(InputError, match="belong to another conversion"):
        build(recipe(pair, seed=2), tmp_path / "split", shard_size=100_000, resume=True)


def test_interrupted_on_the_command_line_says_how_to_go_on() -> None:
    arguments = ["split-llama", "build", "a", "b", "-o", "out"]
    assert "ckptkit split-llama build a b -o out --resume" in how_to_resume(arguments)
    assert how_to_resume(["split-llama", "fit", "a"]) == ""


@pytest.mark.parametrize("mlp", [False, True])
def test_the_original_schema(tmp_path: Path, pair: tuple[Path, Path], splits: dict[str, Path], mlp: bool) -> None:
    """`mlp: false` builds the linear adapter."""
    file = schema(tmp_path, pair, mlp=mlp)
    assert run("--config", file, "-o", tmp_path / "split")[0] == 0
    expected = splits["mlp" if mlp else "linear"]
    assert (tmp_path / "split" / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()


def schema(folder: Path, pair: tuple[Path, Path], **changes: Any) -> Path:
    values = {
        "architectures": ["CustomSplitLLamaForCausalLM"],
        "path8b": str(pair[0]),
        "path70b": str(pair[1]),
        "num_layers_8": NUM_FIRST,
        "num_layers_70": NUM_LAST,
        "mlp": False,
        "vocab_size": 250,
        "rms_norm_eps": 1e-05,
        **changes,
    }
    file = folder / "schema.json"
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return file


def test_schema_paths_may_be_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "8b").mkdir()
    found = read_schema(schema(tmp_path, (Path("8b"), Path("70b"))))
    assert (found.first, found.last) == (str(tmp_path / "8b"), "70b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers_8": None}, "num_layers_8 must be a number of layers, not None"),
        ({"num_layers_70": True}, "num_layers_70 must be a number of layers, not True"),
        ({"path8b": 8}, "path8b must be a path, not 8"),
        ({"mlp": "yes"}, "mlp must be true or false"),
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures is \['LlamaForCausalLM'\]"),
        ({"vocab_size": 251}, "--config says vocab_size 251, the models say 250"),
        ({"rms_norm_eps": 1e-6}, "--config says rms_norm_eps 1e-06"),
    ],
)
def test_wrong_schemas(tmp_path: Path, pair: tuple[Path, Path], changes: dict[str, Any], message: str) -> None:
    file = schema(tmp_path, pair, **changes)
    with pytest.raises(InputError, match=message):
        build(read_schema(file), tmp_path / "split", dry_run=True)
    assert run("--config", file, "-o", tmp_path / "split")[0] == 3


Changed = Callable[[Path], tuple[Path, Path]]


def changed_last(**changes: Any) -> Changed:
    return lambda folder: (save_half(folder / "first", FIRST, 1), save_half(folder / "last", LAST, 2, **changes))


def with_tokenizers(**changes: Any) -> Changed:
    def make(folder: Path) -> tuple[Path, Path]:
        first, last = changed_last()(folder)
        return tokenizer(first), tokenizer(last, **changes)

    return make


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (changed_last(vocab_size=200), "vocab_size 250 and 200"),
        (changed_last(attention_bias=True), "qkv_bias False and True"),
        (changed_last(hidden_act="gelu"), "activation silu and gelu"),
        (lambda f: (save_half(f / "first", FIRST, 1), save_model(f / "q", "qwen2")), "Qwen2ForCausalLM is no Llama"),
        (with_tokenizers(model={"vocab": {"t0": 5}}), r"249 have different ids \('t0' is 0 and 5, \.\.\.\)"),
    ],
)
def test_what_cannot_become_one(tmp_path: Path, models: Changed, message: str) -> None:
    pair = models(tmp_path)
    with pytest.raises(UnsupportedError, match=message):
        build(recipe(pair), tmp_path / "split", accept_differences=True, dry_run=True)
    assert run(*options(pair, tmp_path / "split", "--accept-differences"))[0] == 4


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (changed_last(rope_parameters={"rope_type": "default", "rope_theta": 1e4}), r"rope .*rope_theta 500000\.0 and"),
        (changed_last(num_key_value_heads=4), "key/value heads 2 and 4"),
        (changed_last(head_dim=32), "head_dim 16 and 32"),
        (changed_last(dtype="float32"), "dtype bfloat16 and float32"),
        (with_tokenizers(added_tokens=[]), r"tokenizer\.json: added_tokens"),
        (with_tokenizers(model={"vocab": {f"t{n}": n for n in range(249)}}), r"tokenizer\.json: merges"),
    ],
)
def test_what_has_to_be_accepted(tmp_path: Path, models: Changed, message: str) -> None:
    pair = models(tmp_path)
    with pytest.raises(UsageError, match=f"{message}.*--accept-differences"):
        build(recipe(pair), tmp_path / "split")
    assert run(*options(pair, tmp_path / "split"))[0] == 2
    code, result = run(*options(pair, tmp_path / "split", "--accept-differences"))
    assert code == 0 and any(note.startswith("the two models differ") for note in result["notes"])
    open_checkpoint(tmp_path / "split")


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--num-layers-8", "0"), 2, "--num-layers-8 0: the model has 4 layers"),
        (("--num-layers-8", "5"), 2, "take 1 to 4"),
        (("--num-layers-70", "6"), 2, "--num-layers-70 6: the model has 5 layers"),
        (("--adapter", "cubic"), 2, "one of linear, two-linear, mlp"),
        (("--adapter-init", "zeros"), 2, "--adapter-init zeros; one of kaiming"),
        (("--adapter-init", "file"), 2, "name the file"),
        (("--adapter-init", "file:absent.safetensors"), 3, "no such file"),
        (("--config", "schema.json"), 2, "--config replaces FIRST"),
        (("--shard-size", "much"), 2, "is not a size"),
    ],
)
def test_bad_requests(tmp_path: Path, pair: tuple[Path, Path], more: tuple[str, ...], code: int, message: str) -> None:
    found, result = run(*options(pair, tmp_path / "split", *more))
    assert found == code and message in result["error"]["message"]
    assert not list(tmp_path.iterdir())


def test_missing_arguments(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    code, result = run(pair[0], "-o", tmp_path / "split")
    assert code == 2 and "build needs FIRST, LAST" in result["error"]["message"]
    code, result = run(*options((pair[0], tmp_path / "absent"), tmp_path / "split"))
    assert code == 3 and "no such directory" in result["error"]["message"]


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    """A ReLU wants twice the width, a padded identity room for all coordinates, a file the right shape."""
    middle = {**LAST, "hidden_size": 96, "num_attention_heads": 6}
    first, last = save_half(tmp_path / "first", FIRST, 1), save_half(tmp_path / "last", middle, 2)
    for init in ("orthogonal", "identity-pad"):
        with pytest.raises(UsageError, match="twice as wide"):
            build(recipe((first, last), "mlp", init=init), tmp_path / "split")
    build(recipe((first, last), "mlp"), tmp_path / "split")
    turned = SplitRecipe(str(last), str(first), 1, 1, init="identity-pad")
    with pytest.raises(UsageError, match="96 coordinates do not fit into 64"):
        build(turned, tmp_path / "turned")
    file = tmp_path / "adapter.safetensors"
    save_file({"weight": torch.ones(WIDE, NARROW)}, file)
    with pytest.raises(InputError, match=r"the adapter is \[128, 64\], the models need \[96, 64\]"):
        build(recipe((first, last), init=f"file:{file}"), tmp_path / "no")
    save_file({"linear_1.weight": torch.ones(WIDE, NARROW), "linear_2.weight": torch.ones(96, 96)}, file)
    with pytest.raises(InputError, match="the adapter's matrices are"):
        build(recipe((first, last), "mlp", init=f"file:{file}"), tmp_path / "no")
    with pytest.raises(UsageError, match="holds two matrices"):
        build(recipe((first, last), init=f"file:{file}"), tmp_path / "no")
    save_file({"weight": torch.ones(96)}, file)
    with pytest.raises(InputError, match="not a matrix"):
        build(recipe((first, last), init=f"file:{file}"), tmp_path / "no")
    save_file({"something": torch.ones(96)}, file)
    with pytest.raises(InputError, match="holds no adapter"):
        build(recipe((first, last), init=f"file:{file}"), tmp_path / "no")


def test_the_legacy_layout(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    code, result = run(*options(pair, tmp_path / "split", "--legacy"))
    assert code == 0 and any("does not describe the model by itself" in text for text in result["lossy"])
    raw = json.loads((tmp_path / "split" / "config.json").read_text())
    assert raw["model_type"] == "llama" and (raw["path8b"], raw["path70b"]) == (str(pair[0]), str(pair[1]))


def test_dry_run_at_full_size(tmp_path: Path) -> None:
    """Llama-3.1-8B whole and the last 8 layers of the 70B: 31.0 GB with an MLP between them, planned at once."""
    for name in ("Llama-3.1-8B", "Llama-3.1-70B"):
        sparse_model(tmp_path / name, RELEASED[name]["config"])
    pair = (tmp_path / "Llama-3.1-8B", tmp_path / "Llama-3.1-70B")
    for kind, extra, size in (("linear", 0, 30.87), ("mlp", 2 * 8192 * 8192, 31.0)):
        start = time.monotonic()
        found = build(recipe(pair, kind, num_first=32, num_last=8), tmp_path / "split", dry_run=True)
        assert time.monotonic() - start < 10  # about one second; the machine may be busy
        weights = sum(file["bytes"] for file in found.files if file["path"].endswith(".safetensors"))
        narrow = RELEASED["Llama-3.1-8B"]["elements"] - 128256 * 4096 - 4096
        layer = 2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672 + 2 * 8192
        elements = narrow + 8 * layer + 128256 * 8192 + 8192 + 8192 * 4096
        assert 0 <= weights - 2 * elements - extra < 10 * 65536  # headers
        assert round(found.bytes_total / 1e9, 2) == size
        assert found.bytes_through / found.bytes_total > 0.99
    assert not (tmp_path / "split").exists()


@pytest.mark.parametrize(
    "model",
    [
        {"type": "Unigram", "vocab": [["a"], [], 3]},
        {"type": "Unigram", "vocab": [1, 2]},
        {"type": "BPE", "vocab": {}, "merges": [3]},
        {"type": "BPE", "vocab": {}, "merges": 5},
    ],
)
def test_a_damaged_tokenizer_is_named(pair: tuple[Path, Path], tmp_path: Path, model: dict[str, Any]) -> None:
    first, last = (Path(shutil.copytree(path, tmp_path / path.name)) for path in pair)
    vocabulary = {"type": "BPE", "vocab": {}} if model["type"] == "BPE" else {"type": "Unigram", "vocab": []}
    (first / "tokenizer.json").write_text(json.dumps({"model": vocabulary}))
    (last / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(InputError, match=r"last/tokenizer\.json: not the tokenizer\.json of a tokenizer"):
        build(recipe((first, last)), tmp_path / "out")


def test_a_pair_in_the_wrong_order_is_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    note = f"FIRST is {WIDE} wide and LAST {NARROW}: are they in the right order?"
    assert note in build(recipe((pair[1], pair[0])), tmp_path / "wrong", dry_run=True).notes
    assert not any("right order" in text for text in build(recipe(pair), tmp_path / "right", dry_run=True).notes)


def test_differing_epsilons_are_told_and_kept(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    first = save_half(tmp_path / "first", FIRST, 1, rms_norm_eps=0.3)
    result = build(recipe((first, pair[1])), tmp_path / "split")
    assert "eps of the norms are 0.3 and 1e-05: each half keeps its own" in result.notes
    raw = json.loads((tmp_path / "split" / "config.json").read_text())
    assert [raw[half]["rms_norm_eps"] for half in ("first_config", "last_config")] == [0.3, 1e-5]
