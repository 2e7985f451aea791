"""`run_config.yaml`: what Megatron-Bridge makes of it is what its own bridge makes of config.json.

Those tests need Megatron-Bridge; the others compare with the structure that its loader asks for.
"""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.conversion.convert import convert
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.sharding.grid import Parallelism
from tests.models import save_llama, save_model

BRIDGED = [
    "gqa",
    "tied",
    "llama3",
    "biased",
    "qwen2",
    "qwen2-tied",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "mistral-nemo",
    "gpt_oss",
]
SCORED = ["glm4_moe", "deepseek_v3", "glm4_moe_lite"]
DELTA = ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]
GEMMA = ["gemma3_text"]
GEMMA4 = ["gemma4_text-moe", "gemma4_text-dense", "gemma4_text-e2b"]
BRIDGE = Path(__file__).resolve().parents[2] / "fixtures" / "bridge"
NOT_BRIDGED = {
    "mixtral": "none of Megatron-Bridge 0.6.2's providers is known here for MixtralForCausalLM",
    "ministral": "none of Megatron-Bridge 0.6.2's providers is known here for MinistralForCausalLM",
    "apertus": "none of Megatron-Bridge 0.6.2's providers is known here for ApertusForCausalLM",
    "gemma3": "none of Megatron-Bridge 0.6.2's providers is known here for Gemma3ForConditionalGeneration",
    "qwen3_5": "none of Megatron-Bridge 0.6.2's providers is known here for Qwen3_5ForConditionalGeneration",
    "gemma4": "none of Megatron-Bridge 0.6.2's providers is known here for Gemma4ForConditionalGeneration",
    "gemma4_text-e4b": "Megatron-Bridge 0.6.2 has no model with biases on some linear layers only",
    "gemma3_text-capped": "Megatron-Bridge 0.6.2 has no Gemma 3 with capped logits",
    "qwen3_moe-mixed": "Megatron-Bridge 0.6.2 has no provider with experts on some layers only",
    "qwen3-biased": "Megatron-Bridge 0.6.2 has no model with biases on some linear layers only",
}


def save(path: Path, kind: str, **options: Any) -> Path:
    if kind == "gpt_oss":
        options = {"swiglu_limit": 7.0, **options}  # its bridge always says so
    return (save_llama if kind in ("gqa", "tied", "llama3", "biased") else save_model)(path, kind, **options)


def with_pattern(path: Path) -> Path:
    """A Gemma 3 whose global layers come in turns, as Megatron-Bridge has them."""
    types = [*["sliding_attention"] * 5, "full_attention"]
    return save_model(path, "gemma3_text", num_hidden_layers=6, layer_types=types, query_pre_attn_scalar=16)


def written(folder: Path) -> dict[str, Any]:
    content = yaml.safe_load((folder / "release" / "run_config.yaml").read_text())
    assert content.keys() == {"model", "checkpoint"}
    assert content["checkpoint"]["save_optim"] is content["checkpoint"]["save_rng"] is False
    found: dict[str, Any] = content["model"]
    return found


@pytest.mark.parametrize("kind", [*BRIDGED, *SCORED, *DELTA, *GEMMA, *GEMMA4])
def test_tells_of_the_model(tmp_path: Path, kind: str) -> None:
    source = with_pattern(tmp_path / "hf") if kind in GEMMA else save(tmp_path / "hf", kind)
    result = convert(source, tmp_path / "megatron", to="torch_dist", grid=Parallelism(2, 2))
    assert not [note for note in result.notes if "run_config" in note]
    model = written(tmp_path / "megatron")
    assert model["_target_"].startswith("megatron.bridge.models.")
    assert model["params_dtype"] == {"_target_": "torch.float32", "_call_": False}
    assert (model["tensor_model_parallel_size"], model["pipeline_model_parallel_size"]) == (2, 2)
    layers = 6 if kind in GEMMA else 8 if kind == "gemma4_text-e2b" else 4
    assert (model["hidden_size"], model["num_layers"], model["vocab_size"]) == (96, layers, 250)


@pytest.mark.parametrize("kind", [*BRIDGED, *SCORED, *DELTA, *GEMMA, *GEMMA4])
def test_is_a_source_of_the_config(tmp_path: Path, kind: str) -> None:
    """A checkpoint as Megatron-Bridge leaves it: no `args`, no sidecar."""
    source = with_pattern(tmp_path / "hf") if kind in GEMMA else save(tmp_path / "hf", kind)
    convert(source, tmp_path / "megatron", to="torch_dist", grid=Parallelism(2, 2))
    convert(tmp_path / "megatron", tmp_path / "by_args", to="hf")
    shutil.rmtree(tmp_path / "megatron" / "ckptkit")
    by_args = open_checkpoint(tmp_path / "megatron").config
    (tmp_path / "megatron" / "release" / "common.pt").unlink()
    opened = open_checkpoint(tmp_path / "megatron")
    assert dataclasses.replace(opened.config, vocab_size=250) == by_args
    assert str(opened.grid) == "TP2 x PP2"
    (tmp_path / "megatron" / "release" / "run_config.yaml").unlink()
    with pytest.raises(InputError, match="args lack num_layers"):
        open_checkpoint(tmp_path / "megatron")


@pytest.mark.parametrize("kind", ["gemma4_text-moe", "gemma4_text-e2b"])
def test_what_megatron_bridge_wrote_is_a_source_of_the_config(tmp_path: Path, kind: str) -> None:
    """The whole provider as its own bridge fills it, with a layer spec that it cannot load itself."""
    source = save(tmp_path / "hf", kind, dtype="bfloat16")
    convert(source, tmp_path / "megatron", to="torch_dist")
    shutil.rmtree(tmp_path / "megatron" / "ckptkit")
    release = tmp_path / "megatron" / "release"
    (release / "common.pt").unlink()
    written_there = (BRIDGE / f"{kind}.yaml").read_text()
    (release / "run_config.yaml").write_text(written_there)
    assert ("_gemma4_block_spec" in written_there) == (kind == "gemma4_text-moe")
    opened = open_checkpoint(tmp_path / "megatron")
    assert dataclasses.replace(opened.config, vocab_size=250) == open_checkpoint(source).config
    assert not any("it was made of" in note for note in opened.notes)
    named = yaml.safe_load(written_there)
    named["model"]["hf_model_id"] = "google/some-gemma"
    (release / "run_config.yaml").write_text(yaml.safe_dump(named))
    assert any("it was made of google/some-gemma" in note for note in open_checkpoint(tmp_path / "megatron").notes)
    other = {**named["model"], "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False}}
    towers = {**named["model"], "vision_config": {"hidden_size": 3}}
    for model, match in (
        (other, "activation torch.nn.functional.silu of Gemma 4"),
        (towers, "the towers of a Gemma 4"),
    ):
        (release / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
        with pytest.raises(UnsupportedError, match=match):
            open_checkpoint(tmp_path / "megatron")


def test_no_gemma4_that_the_provider_would_build_otherwise(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention", "full_attention", "full_attention"]
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "do not take turns": ("gemma4_text-moe", {"layer_types": types}),
        "whose first layer has no window": ("gemma4_text-dense", {"layer_types": ["full_attention", *types[:3]]}),
        "shared keys and values": ("gemma4_text-moe", {"num_kv_shared_layers": 2}),
    }
    for match, (kind, changes) in cases.items():
        source = save_model(tmp_path / match, kind, **changes)
        result = convert(source, tmp_path / "megatron", to="torch_dist", dry_run=True)
        assert any("run_config" in note and match in note for note in result.notes), result.notes
    result = convert(save_model(tmp_path / "moe", "gemma4_text-moe"), tmp_path / "m", to="torch_dist", spec="local")
    assert any("without Transformer Engine" in note for note in result.notes)


def test_says_only_what_the_bridge_can_build(tmp_path: Path) -> None:
    for kind, reason in NOT_BRIDGED.items():
        source = save_model(tmp_path / kind, kind)
        result = convert(source, tmp_path / f"{kind}-megatron", to="torch_dist", dry_run=True)
        assert not [file for file in result.files if "run_config" in file["path"]]
        (note,) = (note for note in result.notes if "run_config" in note)
        assert note.endswith(reason)


def test_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"] * 2
    source = save_model(tmp_path / "hf", "gemma3", layer_types=types)
    convert(source, tmp_path / "megatron", to="torch_dist", layout="text")
    assert written(tmp_path / "megatron")["_target_"].endswith(".Gemma3ModelProvider")


def test_specs_and_padding(tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "qwen3_moe")
    convert(source, tmp_path / "local", to="torch_dist", spec="local")
    model = written(tmp_path / "local")
    assert model["transformer_layer_spec"]["_target_"].endswith(".local_layer_spec")
    assert (model["moe_grouped_gemm"], model["should_pad_vocab"]) == (False, False)
    convert(source, tmp_path / "te", to="torch_dist", grid=Parallelism(4))
    model = written(tmp_path / "te")
    assert "transformer_layer_spec" not in model
    assert (model["moe_grouped_gemm"], model["should_pad_vocab"]) == (True, True)


def test_damaged(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "hf")
    convert(source, tmp_path / "megatron", to="torch_dist")
    shutil.rmtree(tmp_path / "megatron" / "ckptkit")
    release = tmp_path / "megatron" / "release"
    (release / "common.pt").unlink()
    model = written(tmp_path / "megatron")
    cases: dict[str, tuple[type[Exception], str]] = {
        "model: [": (InputError, "not valid YAML"),
        "model: !!python/object/apply:os.system ['true']": (InputError, "not valid YAML"),
        "[]": (InputError, "no section `model`"),
        "model: 3": (InputError, "no section `model`"),
        "model: " + "[" * 5000: (InputError, "not valid YAML"),
        yaml.safe_dump({"model": {**model, "num_layers": "many"}}): (InputError, "say num_layers 'many', but it must"),
        yaml.safe_dump({"model": {**model, "interleaved_attn_pattern": 3}}): (InputError, "makes no sense"),
        yaml.safe_dump({"model": {**model, "position_embedding_type": "yarn"}}): (UnsupportedError, "'yarn'"),
    }
    for text, (error, match) in cases.items():
        (release / "run_config.yaml").write_text(text)
        with pytest.raises(error, match=match) as raised:
            open_checkpoint(tmp_path / "megatron")
        assert "\n" not in str(raised.value)


def bridge_of(kind: str) -> Any:
    """Megatron-Bridge's own bridge of a kind."""
    import importlib

    stem = {"gqa": "llama", "tied": "llama", "llama3": "llama", "biased": "llama"}.get(kind, kind.split("-")[0])
    modules = {
        "llama": ("llama.llama_bridge", "LlamaBridge"),
        "qwen2": ("qwen.qwen2_bridge", "Qwen2Bridge"),
        "qwen3": ("qwen.qwen3_bridge", "Qwen3Bridge"),
        "qwen3_moe": ("qwen.qwen3_moe_bridge", "Qwen3MoEBridge"),
        "qwen3_next": ("qwen.qwen3_next_bridge", "Qwen3NextBridge"),
        "qwen3_5_text": ("qwen.qwen35_bridge", "Qwen35Bridge"),
        "qwen3_5_moe_text": ("qwen.qwen35_bridge", "Qwen35MoEBridge"),
        "mistral": ("mistral.mistral_bridge", "MistralBridge"),
        "gpt_oss": ("gpt_oss.gpt_oss_bridge", "GPTOSSBridge"),
        "glm4_moe": ("glm.glm45_bridge", "GLM45Bridge"),
        "glm4_moe_lite": ("glm.glm47_flash_bridge", "GLM47FlashBridge"),
        "deepseek_v3": ("deepseek.deepseek_v3_bridge", "DeepSeekV3Bridge"),
        "gemma3_text": ("gemma.gemma3_bridge", "Gemma3ModelBridge"),
        "gemma4_text": ("gemma.gemma4_bridge", "Gemma4Bridge"),
    }
    module, name = modules[stem]
    return getattr(importlib.import_module(f"megatron.bridge.models.{module}"), name)()


OURS_ALONE = {
    # The grid and the padding of the checkpoint at hand.
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "make_vocab_size_divisible_by",
    "should_pad_vocab",
    # Which type autocasting and pipelines use: that of the weights, which the bridges leave to defaults or to bfloat16.
    "autocast_dtype",
    "pipeline_dtype",
    # Fusions that a bridge turns on for speed; they are settings of a run.
    "bias_activation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "gradient_accumulation_fusion",
    "cross_entropy_loss_fusion",
    "cross_entropy_fusion_impl",
    "attention_softmax_in_fp32",
}

# Of latent attention, the width of a rotating part, which nothing uses; an order that routers with sigmoids lack.
LATENT = {"kv_channels", "moe_router_pre_softmax"}
BETTER: dict[str, set[str]] = {
    "gemma4_text-dense": {"share_embeddings_and_output_weights"},
    "gemma4_text-e2b": {"num_global_query_groups"},
    # Of GPT-OSS, 0.6.2 says the same of the biases of q, k and v, and of windows, in other words.
    "gpt_oss": {"add_qkv_bias", "window_attn_skip_freq"},
    # It does not look into rope_parameters; it counts layers of multi-token prediction by config.json.
    "glm4_moe": {"rotary_percent", "mtp_num_layers"},
    "deepseek_v3": {*LATENT, "mtp_num_layers"},
    # A plain rope is a yarn with a factor of 1 to it; it takes all layers but the first for ones with experts.
    "glm4_moe_lite": {*LATENT, "rope_type", "mscale_all_dim", "moe_layer_freq"},
    # The same layers in other words; of Qwen3-Next it does not look into rope_parameters, and where all layers have
    # experts nothing has the width of a dense one.
    "qwen3_next": {"linear_attention_freq", "moe_layer_freq", "rotary_percent"},
    "qwen3_5_text": {"linear_attention_freq"},
    "qwen3_5_moe_text": {"linear_attention_freq", "moe_layer_freq", "ffn_hidden_size"},
}
"""Kind -> fields that Megatron-Bridge's own bridge leaves at values that are not the model's, or mean the same."""


@pytest.mark.parametrize("kind", [*BRIDGED, *SCORED, *DELTA, *GEMMA, *GEMMA4])
def test_megatron_bridge_builds_the_model_that_its_own_bridge_builds(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("megatron.bridge")
    from megatron.bridge.training.model_load_save import load_model_config
    from transformers import AutoConfig

    dtype = "bfloat16" if kind in (*GEMMA4, "gpt_oss") else "float32"  # its bridges of these always say so
    source = with_pattern(tmp_path / "hf") if kind in GEMMA else save(tmp_path / "hf", kind, dtype=dtype)
    convert(source, tmp_path / "megatron", to="torch_dist")
    ours, _ = load_model_config(str(tmp_path / "megatron" / "release"))
    stand_in = type("Model", (), {"config": AutoConfig.from_pretrained(source)})()
    theirs = bridge_of(kind).provider_bridge(stand_in)
    theirs = theirs() if isinstance(theirs, partial) else theirs
    assert type(ours) is type(theirs)
    if theirs.kv_channels is None:  # it is derived when the model is built
        theirs.kv_channels = theirs.hidden_size // theirs.num_attention_heads
    different = {
        field.name: (getattr(ours, field.name), getattr(theirs, field.name))
        for field in dataclasses.fields(ours)
        if field.name not in {*OURS_ALONE, *BETTER.get(kind, ())}
        and not same(getattr(ours, field.name), getattr(theirs, field.name))
    }
    assert different == {}


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values of a field mean the same: YAML has no tuples, and `partial` has no equality."""
    if isinstance(ours, partial) and isinstance(theirs, partial):
        return (ours.func, ours.args, ours.keywords) == (theirs.func, theirs.args, theirs.keywords)
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return list(ours) == list(theirs)
    return bool(ours == theirs) or (callable(ours) and getattr(ours, "__name__", 1) == getattr(theirs, "__name__", 2))


@pytest.mark.parametrize(("kind", "spec"), [("gemma4_text-dense", "te"), ("mixtral", "local"), ("qwen3", "local")])
def test_megatron_bridge_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, spec: str) -> None:
    """By run_config.yaml, or by `args` where there is none; modules of the local spec, on the CPU."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("megatron.bridge")
    from megatron.bridge.training import model_load_save

    from tests.formats.megatron_ranks import cuda_is_cpu

    if not torch.cuda.is_available():
        cuda_is_cpu(monkeypatch.setattr)
    load_config = model_load_save.load_model_config

    def without_fusions(path: str) -> tuple[Any, Any]:
        config, args = load_config(path)
        for name in FUSIONS:
            setattr(config, name, False)
        return config, args

    monkeypatch.setattr(model_load_save, "load_model_config", without_fusions)
    source = save_model(tmp_path / "hf", kind, tie_word_embeddings=kind.startswith("gemma"))
    convert(source, tmp_path / "m", to="torch_dist", grid=Parallelism(2, 2), spec=spec)
    asked = {"model_type": "gpt"} if kind == "mixtral" else {}
    model = model_load_save.load_megatron_model(str(tmp_path / "m" / "release"), use_cpu_init=True, **asked)
    state = (model[0] if isinstance(model, list) else model).state_dict()
    tensors = open_checkpoint(tmp_path / "m").shard(grid=Parallelism(), tp_rank=0, spec="local")
    assert len(tensors) > 20
    for name, tensor in tensors.items():
        assert torch.equal(state[name][: len(tensor)], tensor[: len(state[name])]), name


FUSIONS = (
    *("gradient_accumulation_fusion", "masked_softmax_fusion", "bias_dropout_fusion", "persist_layer_norm"),
    *("apply_rope_fusion", "bias_activation_fusion", "moe_permute_fusion"),
)
"""Fusions that need a GPU, or APEX."""
