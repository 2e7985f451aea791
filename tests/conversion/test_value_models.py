"""Value models: through every format and back, on ranks against transformers, and made from language models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, open_checkpoint, verify
from ckptkit.errors import InputError, UnsupportedError, UsageError, VerificationError
from ckptkit.families import families, family_called
from ckptkit.families.heads import OF_TOKENS, as_value_config
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.logits import Side, verify_logits
from ckptkit.verification.ranks.pool import RankPool
from tests.models import LLAMAS, files_of, llama_config, model_config, randomise, save_llama, save_model
from tests.precision import MANY_ROWS, relative_error

TOKENS = [[(7 * i + 3 * i * i + 5 * n) % 250 for i in range(n)] for n in (24, 3, 17, 1, 24)]
EXACT = 2e-5
FAST = [
    ("gqa", "LlamaForTokenClassification"),
    ("tied", "LlamaForSequenceClassification"),
    ("qwen3", "Qwen3ForTokenClassification"),
    ("mistral", "MistralForTokenClassification"),
    ("gemma3_text", "Gemma3TextForSequenceClassification"),
    ("gemma3", "Gemma3ForSequenceClassification"),
    ("gemma4_text-e2b", "Gemma4TextForTokenClassification"),
]
STEMS = {family.name: family.value_architectures for family in families() if family.value_architectures}
KINDS = {kind: [kind] for kind in STEMS if kind not in ("llama", "split_llama")}
KINDS["gemma4_text"] = ["gemma4_text-moe", "gemma4_text-dense", "gemma4_text-e2b"]
SLOW = [
    case
    for family, kinds in KINDS.items()
    for kind in kinds
    for name in STEMS[family]
    if (case := (kind, name)) not in FAST
]


def class_called(name: str) -> Any:
    """The class of transformers, or ours where it has none."""
    import transformers

    from ckptkit.surgery.remote import modeling_gemma4_value as ours

    return getattr(ours if name in ours.__all__ else transformers, name)


def build(kind: str, name: str, **changes: Any) -> Any:
    import torch

    torch.manual_seed(0)
    config = (llama_config if kind in LLAMAS else model_config)(kind, **changes)
    config.num_labels = 1
    model = class_called(name)(config)
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("values")

    def get(kind: str, name: str) -> Path:
        path = folder / f"{kind}-{name}"
        if not path.exists():
            build(kind, name).save_pretrained(path)
        return path

    return get


@pytest.mark.parametrize(("kind", "name"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_every_format_and_back(saved: Callable[..., Path], tmp_path: Path, kind: str, name: str) -> None:
    import torch

    source = saved(kind, name)
    for to, grid in (
        ("packed", Parallelism()),
        ("torch", Parallelism(2, 2)),
        ("torch_dist", Parallelism(2, 2)),
    ):
        convert(source, tmp_path / to, to=to, grid=grid)
        assert verify(source, tmp_path / to, level="weights").passed
        convert(tmp_path / to, tmp_path / "hf", to="hf", overwrite=True)
        assert files_of(tmp_path / "hf") == files_of(source)
    # Whole on both tensor parallel ranks of the last stage, and nowhere else.
    shards = {(tp, pp): open_checkpoint(source).shard(tp, 2, pp, 2) for tp in range(2) for pp in range(2)}
    head, prefix = build(kind, name).score, open_checkpoint(source).family.prefix
    for (_, pp), shard in shards.items():
        assert (f"{prefix}output_layer.weight" in shard) == (pp == 1)
        assert (f"{prefix}output_layer.bias" in shard) == (pp == 1 and head.bias is not None)
    assert torch.equal(shards[1, 1][f"{prefix}output_layer.weight"], head.weight)
    assert (head.bias is not None) == name.endswith(OF_TOKENS)


RUN = [
    ("gqa", "LlamaForTokenClassification", Parallelism(2), {"sequence_parallel": True, "packed": True}),
    ("qwen3", "Qwen3ForTokenClassification", Parallelism(1, 2), {}),
    ("mistral", "MistralForSequenceClassification", Parallelism(2), {"sequence_parallel": True}),
    ("gemma3_text", "Gemma3TextForSequenceClassification", Parallelism(2, 2), {"packed": True}),
    ("gemma3", "Gemma3ForSequenceClassification", Parallelism(2), {}),
    ("gemma4_text-e2b", "Gemma4TextForTokenClassification", Parallelism(1, 2), {}),
    ("gemma4_text-moe", "Gemma4TextForSequenceClassification", Parallelism(2), {"sequence_parallel": True}),
]
MORE = [
    ("tied", "LlamaForSequenceClassification", Parallelism(2), {"dp": 2, "dp_kind": "fsdp2"}),
    ("qwen2", "Qwen2ForTokenClassification", Parallelism(2), {"sequence_parallel": True}),
    ("qwen3_moe", "Qwen3MoeForTokenClassification", Parallelism(2, ep=2), {"sequence_parallel": True, "packed": True}),
    ("mixtral", "MixtralForTokenClassification", Parallelism(1, 2, ep=2), {"packed": True}),
    ("apertus", "ApertusForTokenClassification", Parallelism(2, 2), {}),
    ("qwen3_next", "Qwen3NextForTokenClassification", Parallelism(2, ep=2), {"sequence_parallel": True}),
    ("qwen3_5_text", "Qwen3_5TextForSequenceClassification", Parallelism(2, 2), {}),
    ("qwen3_5", "Qwen3_5ForTokenClassification", Parallelism(2), {"packed": True}),
    ("qwen3_5", "Qwen3_5ForSequenceClassification", Parallelism(1, 2), {}),
    ("gemma4_text-dense", "Gemma4TextForTokenClassification", Parallelism(2, 2), {"sequence_parallel": True}),
    ("gemma4_text-e4b", "Gemma4TextForTokenClassification", Parallelism(2, 2), {"packed": True}),
]


@pytest.mark.parametrize(
    ("kind", "name", "grid", "how"), [*RUN, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)], ids=str
)
def test_values_are_those_of_transformers(
    saved: Callable[..., Path],
    pool: RankPool,
    tmp_path: Path,
    kind: str,
    name: str,
    grid: Parallelism,
    how: dict[str, Any],
) -> None:
    source = saved(kind, name)
    convert(source, tmp_path / "meg", to="torch", grid=grid, spec="local")
    report = verify(source, tmp_path / "meg", tokens=TOKENS, tolerance=EXACT, pool=pool, **how)
    assert report.passed, report.levels[-1].summary
    if kind not in ("gqa", "gemma4_text-e2b"):
        return
    for change in ({"score.weight": 1.001}, {"model.norm.weight": 1.001}):
        broken = _scaled(source, tmp_path / "-".join(change), change)
        found = verify_logits(
            Side(broken, "hf"), Side(tmp_path / "meg", "megatron"), tokens=TOKENS, tolerance=EXACT, pool=pool, **how
        )
        assert not found.passed


def _scaled(source: Path, target: Path, change: dict[str, float]) -> Path:
    from safetensors.torch import load_file, save_file

    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {name: value * change.get(name, 1) for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_bfloat16_values_are_judged_by_the_noise_floor(
    saved: Callable[..., Path], pool: RankPool, tmp_path: Path
) -> None:
    source = saved("gqa", "LlamaForTokenClassification")
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2), spec="local")
    sides = Side(source, "hf"), Side(tmp_path / "meg", "megatron")
    # The error of a row is one figure: of a few values it would be large or small by luck.
    how: dict[str, Any] = {"tokens": MANY_ROWS, "dtype": "bfloat16", "pool": pool}
    sound = verify_logits(*sides, **how)
    assert sound.passed, sound.summary
    broken = _scaled(source, tmp_path / "broken", {"score.weight": 1.05})
    assert not verify_logits(Side(broken, "hf"), sides[1], **how).passed


@pytest.mark.parametrize("kind", ["tied", "gqa"])
@pytest.mark.parametrize("init", ["zeros", "normal"])
def test_a_language_model_becomes_a_value_model(tmp_path: Path, kind: str, init: str) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForTokenClassification

    source = save_llama(tmp_path / "lm", kind, dtype="bfloat16")
    result = convert(source, tmp_path / "hf", to="hf", head="value", head_init=init)
    assert result.lossy == ([] if kind == "tied" else ["the language model head is left out (--head value)"])
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "hf"))
    assert after.keys() - before.keys() == {"score.weight", "score.bias"}
    assert before.keys() - after.keys() == (set() if kind == "tied" else {"lm_head.weight"})
    assert all(torch.equal(value, before[name]) for name, value in after.items() if name in before)
    weight = after["score.weight"].float()
    assert weight.shape == (1, 96) and after["score.weight"].dtype == torch.bfloat16
    assert not after["score.bias"].any()
    assert not weight.any() if init == "zeros" else abs(weight.std() / 0.02 - 1) < 0.25 and weight.mean().abs() < 0.01
    model, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_labels == 1
    # The same bytes by way of Megatron.
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2, 2), head="value", head_init=init)
    convert(tmp_path / "meg", tmp_path / "back", to="hf")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def test_the_head_comes_from_a_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = save_model(tmp_path / "lm", "gemma3_text", dtype="bfloat16")
    file = tmp_path / "head.safetensors"
    weight = torch.randn(1, 96)

    def made(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        save_file(tensors, file)
        convert(source, tmp_path / "out", to="hf", head="value", head_init=f"file:{file}", overwrite=True)
        found: dict[str, torch.Tensor] = load_file(tmp_path / "out/model.safetensors")
        return found

    for name in ("score.weight", "reward_head.weight", "v_head.summary.weight"):
        assert torch.equal(made({name: weight})["score.weight"], weight.to(torch.bfloat16))
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [
        "Gemma3TextForSequenceClassification"
    ]
    for tensors, text in (
        ({"weight": weight}, "0 value heads"),
        ({"score.weight": weight, "reward_head.weight": weight.clone()}, "2 value heads"),
        ({"score.weight": weight[:, :95].contiguous()}, r"\[1, 95\], the model asks for \[1, 96\]"),
        (
            {"score.weight": weight, "score.bias": torch.zeros(1)},
            "unexpected tensors in the value head file: score.bias",
        ),
        ({"score.weight": weight, "other": torch.zeros(1)}, "unexpected tensors in the value head file: other"),
        ({"score.weight": torch.zeros(1, 96, dtype=torch.int32)}, "cannot cast"),
    ):
        with pytest.raises((InputError, UnsupportedError), match=text):
            made(tensors)


def test_requests_that_make_no_sense(saved: Callable[..., Path], tmp_path: Path) -> None:
    source, value = save_llama(tmp_path / "lm"), saved("gqa", "LlamaForTokenClassification")
    multimodal = save_model(tmp_path / "mm", "gemma4")
    cases: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (source, {"head": "reward"}, UsageError, "the only choice is: value"),
        (source, {"head_init": "zeros"}, UsageError, "add --head value"),
        (source, {"head": "value", "head_init": "ones"}, UsageError, "zeros, normal or file:PATH"),
        (source, {"head": "value", "head_init": "file:"}, UsageError, "zeros, normal or file:PATH"),
        (source, {"head": "value", "head_init": "file:/none"}, InputError, "no such file"),
        (value, {"head": "value"}, UsageError, "value model already"),
        (multimodal, {"head": "value"}, UnsupportedError, r"known here for Gemma4ForCond(?s:.*)--layout text makes"),
    ]
    for path, arguments, kind, text in cases:
        with pytest.raises(kind, match=text):
            convert(path, tmp_path / "out", to="hf", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gemma3", "Gemma3TextForSequenceClassification"),
        ("gemma4", "Gemma4TextForTokenClassification"),
        ("qwen3_5", "Qwen3_5TextForSequenceClassification"),
    ],
)
def test_a_multimodal_model_gives_its_text_part(tmp_path: Path, kind: str, name: str) -> None:
    source = save_model(tmp_path / "mm", kind)
    convert(source, tmp_path / "out", to="hf", layout="text", head="value")
    assert open_checkpoint(tmp_path / "out").config.architecture == name
    assert (tmp_path / "out/modeling_gemma4_value.py").exists() == (kind == "gemma4")


def test_a_bias_that_the_text_class_lacks_is_said_to_be_left_out(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = saved("qwen3_5", "Qwen3_5ForTokenClassification")
    result = convert(source, tmp_path / "text", to="hf", layout="text")
    assert "Qwen3_5TextForSequenceClassification has no score.bias: left out (--layout text)" in result.lossy
    without = saved("qwen3_5", "Qwen3_5ForSequenceClassification")
    assert len(convert(without, tmp_path / "same", to="hf", layout="text").lossy) == 1


def test_a_multimodal_value_model_keeps_its_towers(tmp_path: Path) -> None:
    """The whole of it becomes a value model of transformers' class, whose text part is the one that is made alone."""
    from safetensors.torch import load_file
    from transformers import Gemma3ForSequenceClassification

    source = save_model(tmp_path / "mm", "gemma3")
    convert(source, tmp_path / "whole", to="hf", head="value", head_init="normal")
    model, info = Gemma3ForSequenceClassification.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_labels == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "whole"))
    assert after.keys() - before.keys() == {"score.weight"} and not before.keys() - after.keys()
    convert(tmp_path / "whole", tmp_path / "text", to="hf", layout="text")
    convert(source, tmp_path / "expected", to="hf", layout="text", head="value", head_init="normal")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "text" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


@pytest.mark.parametrize("kind", ["gemma4_text-dense", "gemma4_text-moe", "gemma4_text-e2b"])
def test_our_class_reads_the_value_where_the_language_model_has_a_logit(tmp_path: Path, kind: str) -> None:
    """A head that is one row of the language model's own head gives the logits of that row."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

    source = save_model(tmp_path / "lm", kind, final_logit_softcapping=None)
    stored = load_file(source / "model.safetensors")
    head = stored.get("lm_head.weight", stored["model.embed_tokens.weight"])
    save_file({"score.weight": head[7:8].clone()}, tmp_path / "head.safetensors")
    convert(source, tmp_path / "value", to="hf", head="value", head_init=f"file:{tmp_path}/head.safetensors")
    tokens = torch.tensor(TOKENS[:1])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source).eval()(tokens).logits[..., 7]
        classes = (AutoModelForTokenClassification, AutoModelForSequenceClassification)
        ours = [it.from_pretrained(tmp_path / "value", trust_remote_code=True).eval() for it in classes]
        values, last = (model(tokens).logits[..., 0] for model in ours)
    assert relative_error(values, expected) < EXACT and relative_error(last, expected[:, -1]) < EXACT
    assert relative_error(values.roll(1, 1), expected) > 1e-2


@pytest.mark.parametrize("labels", [None, 2, 3])
def test_classifiers_of_several_labels_are_refused(tmp_path: Path, labels: int | None) -> None:
    source = save_llama(tmp_path / "lm")
    convert(source, tmp_path / "value", to="hf", head="value")
    file = tmp_path / "value/config.json"
    raw = json.loads(file.read_text())
    raw["id2label"] = None if labels is None else {str(n): f"LABEL_{n}" for n in range(labels)}
    file.write_text(json.dumps(raw))
    with pytest.raises(UnsupportedError, match=f"LlamaForTokenClassification with {labels or 2} labels"):
        open_checkpoint(tmp_path / "value")


def test_value_models_are_those_of_transformers() -> None:
    """transformers has every class, or the directory of the model brings it."""
    import transformers

    for kind, names in STEMS.items():
        brought = [path.rpartition(".")[2] for path in family_called(f"{kind}_value").directory.auto_map.values()]
        for name in names:
            assert hasattr(transformers, name) != (name in brought), name
        assert family_called(f"{kind}_value").architectures == names
    assert {family.name for family in families() if family.name.endswith("_value")} == {
        f"{kind}_value" for kind in STEMS
    }


def test_a_bias_can_be_absent(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "lm")
    convert(source, tmp_path / "value", to="hf", head="value", head_init="normal")
    file = tmp_path / "value/config.json"
    raw = as_value_config(json.loads(file.read_text()), "LlamaForTokenClassification", bias=False)
    assert raw["token_classification_bias"] is False
    file.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"unknown to this family: score\.bias"):
        open_checkpoint(tmp_path / "value")


def test_without_its_config_a_value_model_is_not_taken_for_another(saved: Callable[..., Path], tmp_path: Path) -> None:
    """A bias tells it from a language model; without one, the shape of its head contradicts what it is taken for."""
    import shutil

    for kind, name, known in (
        ("gqa", "LlamaForTokenClassification", True),
        ("tied", "LlamaForSequenceClassification", False),
    ):
        convert(saved(kind, name), tmp_path / name, to="torch", grid=Parallelism(2))
        shutil.rmtree(tmp_path / name / "ckptkit")
        if known:
            assert open_checkpoint(tmp_path / name).config.value_head
            continue
        with pytest.raises(InputError, match=r"output_layer\.weight is \[2, 96\], the config says \[250, 96\]"):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_of_zeros_hides_nothing(pool: RankPool, tmp_path: Path, dtype: str) -> None:
    """All values are 0, whatever the body does: what the head is fed is judged instead."""
    source = save_llama(tmp_path / "lm", "gqa")
    convert(source, tmp_path / "hf", to="hf", head="value")
    convert(tmp_path / "hf", tmp_path / "meg", to="torch", grid=Parallelism(2), spec="local")
    sides = Side(tmp_path / "hf", "hf"), Side(tmp_path / "meg", "megatron")
    how: dict[str, Any] = {"tokens": TOKENS, "tolerance": EXACT, "dtype": dtype, "pool": pool}
    report = verify_logits(*sides, **how)
    assert report.passed, report.summary
    assert "final norm" in [check.name for check in report.checks]
    broken = _scaled(tmp_path / "hf", tmp_path / "broken", {"model.layers.1.mlp.down_proj.weight": 1.5})
    report = verify_logits(Side(broken, "hf"), sides[1], **how)
    assert [check.name for check in report.checks if not check.passed] == ["final norm"]
    with pytest.raises(VerificationError, match="cannot tell packed rows apart"):
        verify_logits(*sides, **how, packed=True)
