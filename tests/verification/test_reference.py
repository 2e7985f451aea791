from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit.errors import InputError, UnsupportedError, VerificationError
from ckptkit.megatron.run_config import RunConfig
from ckptkit.verification.ranks.jobs import LogitsJob
from ckptkit.verification.reference import OTHER_ATTENTION, run_reference
from tests.precision import relative_error


@pytest.fixture
def copy(llama: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama("gqa", num_hidden_layers=2), tmp_path / "copy"))


def run(path: Path, **options: Any) -> Any:
    how = RunConfig(dtype=options.pop("dtype", "float32"))
    values: dict[str, Any] = {"output": str(path / "out.safetensors"), **options}
    return run_reference(LogitsJob(str(path), how, [[1, 2, 3], [4, 5]], **values))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_the_continuation_is_that_of_generate(copy: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    result = run(copy, greedy=6)
    model: Any = LlamaForCausalLM.from_pretrained(copy)
    for row, prompt in zip(result.rows, ([1, 2, 3], [4, 5]), strict=True):
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert row == model.generate(torch.tensor([prompt]), **options)[0].tolist()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "missing keys: model.norm.weight"),
        (lambda tensors: tensors.pop("lm_head.weight"), "missing keys: lm_head.weight"),
        (lambda tensors: tensors.update(extra=tensors["model.norm.weight"] + 1), "unexpected keys: extra"),
    ],
)
def test_weights_that_transformers_would_invent_or_ignore(copy: Path, change: Any, text: str) -> None:
    edit(copy, change)
    with pytest.raises(InputError, match=text):
        run(copy)


def test_a_tensor_of_another_shape(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][:-1].clone()}))
    with pytest.raises(InputError, match=r"model\.norm\.weight|mismatch"):
        run(copy)


def test_configs_that_cannot_run(copy: Path) -> None:
    config = copy / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "architectures": ["ElephantForCausalLM"]}))
    with pytest.raises(UnsupportedError, match="has no ElephantForCausalLM"):
        run(copy)
    config.write_text(json.dumps({**raw, "architectures": None}))
    with pytest.raises(InputError, match="names no architecture"):
        run(copy)
    config.write_text("{")
    with pytest.raises(InputError, match=r"cannot read config\.json"):
        run(copy)
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"cannot read config\.json"):
        run(copy)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory")])
def test_a_lack_of_memory_says_nothing_about_the_model(
    copy: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from transformers import LlamaForCausalLM

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    with pytest.raises(VerificationError, match="could not run it"):
        run(copy)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(VerificationError, match="cannot load it"):
        run(copy)


def test_experts_run_one_by_one(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = MixtralForCausalLM(MixtralConfig(vocab_size=30, num_hidden_layers=2, num_local_experts=4, **sizes))
    model.save_pretrained(tmp_path)
    result = run(
        tmp_path, dtype="bfloat16", probes=str(tmp_path / "probes")
    )  # the grouped kernel refuses a width of 20
    assert "model.layers.1.mlp.experts.down_proj" in result.feeds["layers.1.mlp"]
    assert result.feeds["head"] == ["lm_head.weight"]


def test_a_second_run_computes_attention_in_another_way(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is eager; the other implementation is told from it by a fault that is put into it."""
    from transformers import LlamaForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    first, second = twice(copy, "sound")
    assert first.keys() == second.keys()
    assert all(relative_error(second[key], first[key]) < 1e-4 for key in first)

    def lost(*arguments: Any, **options: Any) -> Any:
        output, weights = original(*arguments, **options)
        return output * 0, weights

    original = ALL_ATTENTION_FUNCTIONS[OTHER_ATTENTION]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, OTHER_ATTENTION, lost)
    untouched, faulty = twice(copy, "faulty")
    assert all(relative_error(untouched[key], first[key]) < 1e-4 for key in first)
    assert all(relative_error(faulty[key], first[key]) > 0.1 for key in first)

    def refuse(self: Any, implementation: str) -> None:
        raise ValueError(implementation)

    monkeypatch.setattr(LlamaForCausalLM, "set_attn_implementation", refuse)
    run(copy, again=str(copy / "none"))
    assert not (copy / "none").exists()


def twice(path: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Logits of a run and of its second run."""
    from safetensors.torch import load_file

    result = run(path, greedy=2, again=str(path / name))
    return load_file(result.logits), load_file(result.again)


def test_probes_hold_the_last_positions_of_every_row(copy: Path) -> None:
    from ckptkit.verification.probes import places
    from ckptkit.verification.runs import read_probes

    result = run(copy, greedy=70, probes=str(copy / "probes"))
    states = read_probes(result)
    assert list(states) and set(states) == set(places(2, ("self_attention", "mlp", "output")))
    assert {tuple(state.shape) for (state,) in states.values()} == {(2 * 64, 96)}
    alone = run(copy, probes=str(copy / "alone"))
    assert {tuple(state.shape) for (state,) in read_probes(alone).values()} == {(3 + 2, 96)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_act": 3}, "Field 'hidden_act' expected str, got int"),
        ({"attention_dropout": "a"}, "doesn't match any type in (int, float, NoneType)"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "Missing required keys in `rope_parameters`"),
        ({"bos_token_id": "x"}, "Field 'bos_token_id' with value 'x'"),
        ({"num_attention_heads": 7}, "weights do not fit|cannot load it"),
    ],
)
def test_a_config_that_transformers_refuses_is_damaged_input(copy: Path, change: dict[str, Any], told: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError) as caught:
        run(copy)
    text = str(caught.value)
    assert any(part in text for part in told.split("|"))
    assert "Error" not in text and "<class" not in text and "\n" not in text
