"""Formats that are known but not read are named with code 4 and the next step, by files and by names of tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.errors import CkptkitError, InputError, UnsupportedError
from ckptkit.formats.foreign import FOREIGN, refuse_foreign_files
from ckptkit.inspection.differences import diff
from ckptkit.inspection.summary import inspect
from ckptkit.inspection.validation import validate
from fixtures.make_damaged import SOUND

FILES = {
    "global_step100/zero_pp_rank_0_mp_rank_00_optim_states.pt": "DeepSpeed .ZeRO.*zero_to_fp32",
    "global_step100/bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt": "DeepSpeed .ZeRO.*zero_to_fp32",
    "global_step100/mp_rank_00_model_states.pt": "DeepSpeed .ZeRO",
    "mp_rank_00_model_states.pt": "DeepSpeed .ZeRO",
    "zero_to_fp32.py": "DeepSpeed .ZeRO",
    "layer_01-model_00-model_states.pt": "Megatron-DeepSpeed.*deepspeed_to_transformers",
    "global_step20/layer_01-model_00-model_states.pt": "Megatron-DeepSpeed",
    "adapter_config.json": "part of an adapter of PEFT.*belong into one folder",
    "adapter_model.safetensors": "PEFT",
    "adapter_model.bin": "PEFT",
    "delta.json": "a delta between two checkpoints.*ckptkit delta apply",
    "consolidated.00.pth": "original files of a Llama.*convert_llama_weights_to_hf",
    "original/consolidated.00.pth": "original files of a Llama",
    "consolidated.safetensors": "original files of a Mistral.*convert_mistral_weights_to_hf",
    "consolidated-00001-of-00002.safetensors": "original files of a Mistral",
    "model.nemo": "NeMo 1.*export",
    "model_config.yaml": "NeMo 1",
    "model-Q4_K_M.gguf": "GGUF.*convert from the model that it was made of",
    "rank0.engine": "TensorRT",
    "rank0.safetensors": "TensorRT",
    "model.onnx": "ONNX",
    "onnx/model.onnx": "ONNX",
    "flax_model.msgpack": "JAX",
    "_CHECKPOINT_METADATA": "JAX",
    "default/manifest.ocdbt": "JAX",
    "tf_model.h5": "TensorFlow",
    "model.ckpt-1000.index": "TensorFlow",
    "model-rank-0-part-0.safetensors": "vLLM",
    "weights.npz": "MLX",
    "model_state.pdparams": "Paddle",
    "epoch=3.ckpt": "Lightning",
}


def named(path: Path, match: str, **options: Any) -> None:
    """What converting, inspecting and validating say: the format and what to do, with code 4."""
    for command in (open_checkpoint, inspect, validate):
        with pytest.raises(UnsupportedError, match=match) as caught:
            command(path, **options)
        assert caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_known_by_its_files(tmp_path: Path, name: str, config: bool) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}" if name.endswith(".json") else "x")
    if config:
        shutil.copy(SOUND / "hf" / "config.json", tmp_path)
    named(tmp_path, FILES[name])


def test_every_known_format_is_tried() -> None:
    for foreign in FOREIGN:
        assert any(foreign.names.fullmatch(name) for name in FILES), foreign.what


@pytest.mark.parametrize("name", ["model.nemo", "model.gguf"])
def test_a_file_in_place_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    named(tmp_path / name, "NeMo 1|GGUF")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="not a directory; give the folder that it is in"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_what_is_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    refuse_foreign_files(tmp_path)
    with pytest.raises(InputError, match="not a checkpoint that ckptkit knows"):
        open_checkpoint(tmp_path)
    shutil.copytree(SOUND / "hf", tmp_path / "checkpoint-5")
    with pytest.raises(InputError, match="give one of the folders in it: checkpoint-5"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["zero_to_fp32.py", "global_step100/mp_rank_00_model_states.pt", "model.gguf"])
def test_beside_a_model_they_decide_nothing(tmp_path: Path, name: str) -> None:
    """The Trainer keeps DeepSpeed's state beside the gathered weights."""
    folder = Path(shutil.copytree(SOUND / "hf", tmp_path / "hf"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert diff(SOUND / "hf", folder).same


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Path]:
    """Saves the sound model with other tensors."""
    from safetensors.torch import load_file, save_file

    def save(change: Callable[[dict[str, Any]], Any]) -> Path:
        state = {
            name: value for file in (SOUND / "hf").glob("*.safetensors") for name, value in load_file(file).items()
        }
        changed = change(state) or state
        folder = tmp_path / "model"
        folder.mkdir()
        shutil.copy(SOUND / "hf" / "config.json", folder)
        save_file({name: value.clone() for name, value in changed.items()}, folder / "model.safetensors")
        return folder

    return save


LORA = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
PARTS = {
    LORA: r"LoRA adapters beside the weights \(model\.layers.*merge_and_unload",
    "v_head.summary.weight": "value head of TRL",
    "model.layers.0.self_attn.q_proj.weight_quantizer._amax": "ModelOpt",
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_trainers_in_a_hugging_face_directory(weights: Any, name: str) -> None:
    import torch

    named(weights(lambda state: state.update({name: torch.ones(2, 2)})), PARTS[name])


def test_adapters_inside_of_their_model(weights: Any) -> None:
    """PEFT puts `base_model.model.` before all names, and `base_layer` behind those that it adapts."""
    import torch

    def adapted(state: dict[str, Any]) -> dict[str, Any]:
        found = {f"base_model.model.{name.replace('q_proj.', 'q_proj.base_layer.')}": state[name] for name in state}
        return {**found, f"base_model.model.{LORA}": torch.ones(2, 2)}

    named(weights(adapted), "LoRA adapters beside the weights")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", "adapters of Megatron"),
        ("decoder.layers.0.self_attention.linear_qkv.to_wrap.weight", "adapters of Megatron"),
        ("language_model.encoder.layers.0.input_norm.weight", "before Megatron-Core.*--loader legacy"),
        ("v_head.summary.weight", "value head of TRL"),
    ],
)
def test_parts_of_trainers_in_megatrons_files(tmp_path: Path, name: str, match: str) -> None:
    import torch

    folder = Path(shutil.copytree(SOUND / "torch", tmp_path / "run"))
    for file in folder.glob("release/*/*.pt"):
        content = torch.load(file, weights_only=False)
        content["model"][name] = torch.ones(2, 2)
        torch.save(content, file)
    named(folder, match)


def test_the_layout_before_megatron_core(tmp_path: Path) -> None:
    import torch

    folder = Path(shutil.copytree(SOUND / "torch", tmp_path / "run"))
    for file in folder.glob("release/*/*.pt"):
        content = torch.load(file, weights_only=False)
        content["model"] = {"language_model": {"encoder": {"layers.0.input_norm.weight": torch.ones(2)}}}
        torch.save(content, file)
    named(folder, "before Megatron-Core.*--loader legacy --saver core")


STARTS = ("_orig_mod.", "module.", "base_model.model.", "model.", "policy.llm.")


@pytest.mark.parametrize("start", STARTS)
def test_a_start_before_all_names_is_read_with_a_note(weights: Any, start: str) -> None:
    folder = weights(lambda state: {start + name: value for name, value in state.items()})
    assert diff(SOUND / "hf", folder).same
    assert any(start.removesuffix(".") in note for note in open_checkpoint(folder).notes)
    assert validate(folder, values=True).passed


@pytest.mark.parametrize("word", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_words_inside_of_names_are_read_with_a_note(weights: Any, word: str) -> None:
    folder = weights(lambda state: {f"{word}.{n}".replace("s.0.", f"s.0.{word}."): state[n] for n in state})
    assert diff(SOUND / "hf", folder).same
    assert any(word in note for note in open_checkpoint(folder).notes)


def test_a_start_that_some_names_lack_is_named(weights: Any) -> None:
    def some(state: dict[str, Any]) -> dict[str, Any]:
        return {name if name == "model.norm.weight" else f"policy.{name}": state[name] for name in state}

    folder = weights(some)
    with pytest.raises(InputError, match=r"all that is missing is there, behind the prefix policy\."):
        open_checkpoint(folder)


@pytest.mark.parametrize("base", ["torch", "torch_dist", "packed"])
def test_a_start_before_megatrons_names(tmp_path: Path, base: str) -> None:
    """`module.` is Megatron's own in files of ranks, and needs no note there; any other does."""
    import torch
    from safetensors.torch import load_file, save_file

    start, folder = "policy.module.", tmp_path / "run"
    if base == "packed":
        convert(SOUND / "hf", folder, to="packed")
        state = load_file(folder / "model.safetensors")
        save_file({start + name: state[name] for name in state}, folder / "model.safetensors")
    elif base == "torch":
        shutil.copytree(SOUND / "torch", folder)
        for file in folder.glob("release/*/*.pt"):
            content = torch.load(file, weights_only=False)
            content["model"] = {start + name: value for name, value in content["model"].items()}
            torch.save(content, file)
    else:
        import torch.distributed.checkpoint as dcp

        shutil.copytree(SOUND / "torch_dist", folder)
        reader = dcp.FileSystemReader(str(folder / "release"))
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        state = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in stored.items()
            if hasattr(entry, "size")
        }
        dcp.load(state, storage_reader=reader, no_dist=True)
        for file in [*folder.glob("release/*.distcp"), folder / "release" / ".metadata"]:
            file.unlink()
        dcp.save({start + key: state[key] for key in state}, checkpoint_id=str(folder / "release"), no_dist=True)
    assert diff(SOUND / "hf", folder).same
    assert any(f"begin with {start}" in note for note in open_checkpoint(folder).notes)


ROTARY = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
)


@pytest.mark.parametrize("name", [*ROTARY, "model.rotary_emb_local.inv_freq"])
def test_rotary_frequencies_come_along(weights: Any, tmp_path: Path, name: str) -> None:
    import torch
    from safetensors.torch import load_file

    folder = weights(lambda state: state.update({name: torch.arange(4.0)}))
    convert(folder, tmp_path / "out", to="torch")
    convert(tmp_path / "out", tmp_path / "back", to="hf")
    assert load_file(tmp_path / "back" / "model.safetensors")[name].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "name", ["model.layers.99.self_attn.rotary_emb.inv_freq", "model.other.inv_freq", "model.rotary_emb.weight"]
)
def test_what_is_no_rotary_frequency_is_refused(weights: Any, name: str) -> None:
    import torch

    with pytest.raises(CkptkitError, match="1 unknown to this family"):
        open_checkpoint(weights(lambda state: state.update({name: torch.arange(4.0)})))


@pytest.mark.parametrize("name", ["rotary_pos_emb.inv_freq", "decoder.layers.0.self_attention.rotary_emb.inv_freq"])
def test_rotary_frequencies_of_megatron_are_left_out_with_a_note(tmp_path: Path, name: str) -> None:
    import torch

    folder = Path(shutil.copytree(SOUND / "torch", tmp_path / "run"))
    for file in folder.glob("release/*/*.pt"):
        content = torch.load(file, weights_only=False)
        content["model"][name] = torch.ones(4)
        torch.save(content, file)
    assert diff(SOUND / "hf", folder).same
    assert f"{name} and its like follow from the config, and are left out" in open_checkpoint(folder).notes
