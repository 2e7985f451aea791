"""The small installation: whatever only moves bytes works where torch, transformers and megatron-core are not there.

What these commands write is compared with what they write where the packages are there, or with the source. Commands
that need a package say so in one line.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from ckptkit.errors import UnsupportedError, VerificationError
from fixtures.make_damaged import SOUND
from tests.editing.test_vocabulary import NEW, OLD, write_tokenizer
from tests.lora import save_adapter
from tests.models import files_of
from tests.without import HEAVY, ckptkit, several

HF = SOUND / "hf"


def succeed(cwd: Path, *commands: Sequence[object]) -> list[str]:
    """Runs commands without the packages. Returns what each printed."""
    answers = several(commands, cwd=cwd)
    for command, answer in zip(commands, answers, strict=True):
        assert answer.returncode == 0, (command, answer.stderr or answer.stdout)
    return [answer.stdout for answer in answers]


def test_the_packages_are_not_there() -> None:
    found = json.loads(ckptkit("doctor", "--json").stdout)
    absent = {package["name"] for package in found["packages"] if package["problem"] == "not installed"}
    assert absent == {"torch", "transformers", "safetensors", "megatron-core", "huggingface-hub", "peft"}


@pytest.mark.parametrize(
    "options",
    [
        "--to hf",
        "--to packed",
        "--to torch --tp 2 --pp 2",
        "--to torch --tp 2 --spec verl",
        "--to torch --megatron-model hybrid",
        "--to torch_dist --tp 2",
    ],
)
def test_every_format_there_and_back(options: str, tmp_path: Path) -> None:
    """Also what looks at the result: inspect, diff, validate, hash, and verify up to the weights."""
    *_, source, there, verified = succeed(
        tmp_path,
        ["convert", HF, "there", *options.split()],
        ["convert", "there", "back", "--to", "hf"],
        ["inspect", "there"],
        ["diff", HF, "there"],
        ["validate", "there", "--values"],
        ["hash", HF, "--only", "tensors"],
        ["hash", "there", "--only", "tensors"],
        ["verify", HF, "there", "--level", "weights"],
    )
    assert files_of(tmp_path / "back") == files_of(HF)
    assert source.split()[-2] == there.split()[-2] and verified.endswith("same\n")


def test_conversions_that_compute(tmp_path: Path) -> None:
    options = {"wide": "--dtype float32", "value": "--head value"}
    commands = [["convert", HF, name, "--to", "hf", *words.split()] for name, words in options.items()]
    for folder, without in (("small", HEAVY), ("whole", ())):
        (tmp_path / folder).mkdir()
        assert [answer.returncode for answer in several(commands, without=without, cwd=tmp_path / folder)] == [0, 0]
    assert files_of(tmp_path / "small") == files_of(tmp_path / "whole")


def test_quantised_weights(tmp_path: Path) -> None:
    from tests.models import save_llama

    save_llama(tmp_path / "model", dtype="bfloat16")
    succeed(
        tmp_path,
        ["convert", "model", "fp8", "--to", "hf", "--quantise", "fp8-block"],
        ["convert", "fp8", "there", "--to", "torch", "--tp", "2"],
        ["convert", "there", "back", "--to", "hf", "--quantise", "like:fp8"],
        ["validate", "back"],
    )
    assert files_of(tmp_path / "back") == files_of(tmp_path / "fp8")


def test_shards_of_trainers(tmp_path: Path) -> None:
    """Formats that are read alone: verl's FSDP shards, and a plain distributed checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    state = {name: tensor for file in sorted(HF.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    for folder in ("actor", "dcp"):
        (tmp_path / folder / "huggingface").mkdir(parents=True)
        shutil.copy(HF / "config.json", tmp_path / folder / "huggingface")
    torch.save(state, tmp_path / "actor" / "model_world_size_1_rank_0.pt")
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for folder in ("actor", "dcp"):
        succeed(tmp_path, ["convert", folder, f"{folder}-hf", "--to", "hf"], ["diff", HF, f"{folder}-hf"])


def test_adapters(tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft", HF)
    reference = ["--hf-reference", HF]
    succeed(
        tmp_path,
        ["convert", "peft", "there", "--to", "torch_dist", "--tp", "2", *reference],
        ["convert", "there", "back", "--to", "peft", *reference],
        ["adapter", "merge", HF, "peft", "-o", "merged", "--to", "hf"],
        ["convert", HF, "both", "--to", "torch_dist", "--adapter", "peft"],
        ["adapter", "export", "both", "-o", "exported", *reference],
        ["adapter", "extract", HF, "merged", "-o", "extracted", "--rank", "4"],
    )
    weights = [tmp_path / folder / "adapter_model.safetensors" for folder in ("peft", "back", "exported")]
    assert len({file.read_bytes() for file in weights}) == 1
    assert ckptkit("diff", HF, "merged", cwd=tmp_path).returncode == 1


def test_deltas(tmp_path: Path) -> None:
    succeed(
        tmp_path,
        ["surgery", "slice", HF, "-o", "new", "--layers", "1,0"],
        ["delta", "make", HF, "new", "-o", "step.delta"],
        ["inspect", "step.delta"],
        ["delta", "apply", HF, "step.delta", "-o", "applied", "--to", "torch", "--tp", "2"],
        ["diff", "new", "applied"],
    )


def test_surgery(tmp_path: Path) -> None:
    for folder, tokens in (("base", OLD), ("new", NEW)):
        shutil.copytree(HF, tmp_path / folder)
        write_tokenizer(tmp_path / folder, tokens)
    recipe = f"merge_method: slerp\nbase_model: {HF}\nmodels: [{{model: {HF}}}, {{model: reversed}}]\n"
    (tmp_path / "recipe.yaml").write_text(recipe + "parameters: {t: 0.3}\ndtype: bfloat16\n", encoding="utf-8")
    succeed(
        tmp_path,
        ["surgery", "slice", HF, "-o", "reversed", "--layers", "1,0"],
        ["surgery", "average", HF, "reversed", "-o", "mean", "--weights", "0.25,0.75"],
        ["surgery", "stack", f"{HF}:0-1", "reversed:1", "-o", "tall", "--to", "torch"],
        ["surgery", "merge", "recipe.yaml", "-o", "merged"],
        ["surgery", "resize-vocab", "base", "-o", "resized", "--tokenizer", "new"],
        *(["validate", out, "--values"] for out in ("mean", "tall", "merged", "resized")),
    )


def test_families_and_help(tmp_path: Path) -> None:
    commands = ("convert", "verify", "surgery", "doctor", "split-llama")
    families, *_ = succeed(tmp_path, ["families"], *([command, "--help"] for command in commands))
    assert "LlamaForCausalLM" in families


@pytest.mark.parametrize(
    ("arguments", "code", "package"),
    [
        (["verify", HF, HF], VerificationError.exit_code, "torch, transformers and safetensors are not"),
        (["verify", HF, HF, "--trainability", "length"], 2, "one checkpoint"),
        (["verify", HF, "--trainability", "length"], VerificationError.exit_code, "torch"),
        (["convert", "some/model", "out", "--to", "torch"], UnsupportedError.exit_code, "huggingface-hub"),
    ],
)
def test_what_needs_a_package_says_so(arguments: list[object], code: int, package: str, tmp_path: Path) -> None:
    done = ckptkit(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []
    assert re.search(package, done.stderr) and (code == 2 or "pip install '" in done.stderr)


def test_without_torch_alone_torch_is_named(tmp_path: Path) -> None:
    done = ckptkit("verify", HF, HF, "--json", "-", without=["torch"], cwd=tmp_path)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["kind"]) == (6, "verification")
    assert error["hint"].startswith("pip install 'torch>=") and "transformers" not in error["hint"]
