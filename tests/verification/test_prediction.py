"""The level prediction: layers of multi-token prediction run in both libraries, and their faults are named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import modeling_layers

from ckptkit import Parallelism, convert, open_checkpoint, verify
from ckptkit.errors import InputError
from ckptkit.verification.levels import prediction_of
from ckptkit.verification.logits import verify_logits
from ckptkit.verification.ranks.pool import RankPool
from ckptkit.verification.sides import Side
from tests.megatron.test_families_against_transformers import rewrite, shards
from tests.models import add_prediction, save_model
from tests.precision import MANY_ROWS

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(modeling_layers, "MtpModel", None), "get_weight_conversions"),
    reason="this transformers runs no multi-token prediction",
)

BLOCK = "mtp.layers.0."
INNER = BLOCK + "transformer_layer."
MODULE = "tests.verification.test_prediction:"
PREDICTS = ("glm4_moe", "deepseek_v3", "glm4_moe_lite")
APART = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe")
"""Kinds whose archives have one such layer, apart from the others."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Kind and number of layers of multi-token prediction -> a model, saved once."""
    known: dict[tuple[str, int, str], Path] = {}

    def saved(kind: str, count: int = 1, **changes: Any) -> Path:
        key = kind, count, str(changes)
        if key not in known:
            model = save_model(tmp_path_factory.mktemp("hf") / kind, kind, **changes)
            known[key] = add_prediction(model, count)
        return known[key]

    return saved


@pytest.fixture(scope="module")
def one_rank() -> Iterator[RankPool]:
    """A rank of our own: some faults change its code."""
    with RankPool(1) as pool:
        yield pool


def predicted(reference: Path, candidate: Path, pool: RankPool, count: int = 1, **options: Any) -> Any:
    sides = Side(reference, "hf", prediction=count), Side(candidate, "megatron", prediction=count)
    return verify_logits(*sides, greedy=0, pool=pool, device="cpu", **{"tolerance": 1e-5, **options})


GRIDS: list[tuple[str, int, Parallelism, dict[str, Any]]] = [
    ("deepseek_v3", 2, Parallelism(2, 2), {"sequence_parallel": True}),
    ("glm4_moe", 2, Parallelism(1, 2, 2), {"packed": True}),
    ("glm4_moe_lite", 1, Parallelism(2, ep=2), {"cp": 2}),
    ("qwen3_next", 1, Parallelism(2, 2), {"sequence_parallel": True, "tolerance": 1e-4}),
    ("qwen3_5_text", 1, Parallelism(1, 2, 2), {"packed": True, "tolerance": 1e-4}),
]
SLOW: list[tuple[str, int, Parallelism, dict[str, Any]]] = [
    *((kind, 1, Parallelism(1, 2, ep=2), {}) for kind in PREDICTS),
    *((kind, 2, Parallelism(2, 2, 2), {"sequence_parallel": True, "packed": True}) for kind in PREDICTS),
    *((kind, 1, Parallelism(2, 2), {"packed": True, "tolerance": 1e-4}) for kind in APART),
    *((kind, 1, Parallelism(2), {"dtype": "float64"}) for kind in APART),
    ("qwen3_5_text", 1, Parallelism(1, 2), {"dtype": "bfloat16", "tokens": MANY_ROWS}),
    ("glm4_moe", 1, Parallelism(2), {"dp": 2}),
    ("deepseek_v3", 1, Parallelism(2), {"dtype": "bfloat16", "tokens": MANY_ROWS}),
    ("glm4_moe", 1, Parallelism(1, 2), {"dtype": "bfloat16", "tokens": MANY_ROWS}),
    ("glm4_moe", 3, Parallelism(), {"dtype": "float64"}),
    *((kind, 2, Parallelism(1, 2), {"cp": 2, "packed": True}) for kind in PREDICTS),
    ("glm4_moe", 3, Parallelism(), {"cp": 4}),
    ("deepseek_v3", 2, Parallelism(2), {"cp": 2, "sequence_parallel": True}),
]


@pytest.mark.parametrize(
    ("kind", "count", "grid", "options"), [*GRIDS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_logits(
    source: Callable[..., Path],
    tmp_path: Path,
    pool: RankPool,
    kind: str,
    count: int,
    grid: Parallelism,
    options: dict[str, Any],
) -> None:
    model = source(kind, count)
    convert(model, tmp_path / "meg", to="torch", grid=grid)
    report = predicted(model, tmp_path / "meg", pool, count, **options)
    assert report.passed, (report.summary, report.location)
    assert any("MultiTokenPredictionBlock" in name for name in report.megatron_modules)
    assert report.routing is None or report.routing.layers[-1].layer == 4 + count - 1


@pytest.mark.parametrize(
    "kind", ["glm4_moe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3_next", "qwen3_5"))]
)
def test_verify_runs_them(source: Callable[..., Path], tmp_path: Path, pool: RankPool, kind: str) -> None:
    model = source(kind)
    convert(model, tmp_path / "meg", to="torch")
    report = verify(model, tmp_path / "meg", device="cpu", pool=pool)
    assert report.passed and [level.name for level in report.levels][-2:] == ["logits", "prediction"]
    assert not any("by its weights alone" in message for message in report.messages)
    below = verify(model, tmp_path / "meg", level="weights")
    assert [level.name for level in below.levels] == ["structure", "weights"]


def test_where_transformers_runs_none_of_them(source: Callable[..., Path]) -> None:
    """It makes a layer that is apart like the last one of the model, which then must have attention."""
    found = open_checkpoint(source("qwen3_next"))
    *first, last = found.config.layers
    other = replace(found, config=replace(found.config, layers=(*first, replace(last, delta=first[0].delta))))
    question: Any = SimpleNamespace(runs=True)
    assert prediction_of((found, found), question) == 1
    assert prediction_of((other, found), question) == prediction_of((found, other), question) == 0


def exchanged(first: str, second: str) -> Callable[[dict[str, Any]], None]:
    def change(model: dict[str, Any]) -> None:
        model[first], model[second] = model[second], model[first]

    return change


def changed(name: str, new: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda model: model.update({name: new(model[name])})


def halves_exchanged(weight: Any) -> Any:
    import torch

    return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)


def gates_exchanged(weight: Any) -> Any:
    return weight.view(4, 8, 16, -1)[:, [3, 4, 5, 0, 1, 2, 6, 7]].reshape(weight.shape)


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], None], str, str]] = {
    # what -> kind, change to the file, the place in the layer, tensor that must be named
    "halves exchanged": ("glm4_moe", changed(f"{BLOCK}eh_proj.weight", halves_exchanged), "projection", "eh_proj"),
    "halves exchanged where they are apart": (
        "qwen3_next",
        changed(f"{BLOCK}eh_proj.weight", halves_exchanged),
        "projection",
        "eh_proj",
    ),
    "gates exchanged with queries": (
        "qwen3_5_text",
        changed(f"{INNER}self_attention.linear_qkv.weight", gates_exchanged),
        "self_attention",
        "linear_qkv",
    ),
    "norms exchanged": (
        "deepseek_v3",
        exchanged(f"{BLOCK}enorm.weight", f"{BLOCK}hnorm.weight"),
        "embedding norm",
        "enorm",
    ),
    "norm of the hidden state off": (
        "glm4_moe",
        changed(f"{BLOCK}hnorm.weight", lambda weight: weight * 0 + 1),
        "hidden norm",
        "hnorm",
    ),
    "last norm off": (
        "deepseek_v3",
        changed(f"{BLOCK}final_layernorm.weight", lambda weight: weight * 0 + 1),
        "final norm",
        "final_layernorm",
    ),
    "shared expert without effect": (
        "glm4_moe",
        changed(f"{INNER}mlp.shared_experts.linear_fc2.weight", lambda weight: weight * 0),
        "mlp",
        "shared_experts.linear_fc2",
    ),
    "norm before attention off": (
        "glm4_moe_lite",
        changed(f"{INNER}input_layernorm.weight", lambda weight: weight * 0 + 1),
        "projection",
        "input_layernorm",
    ),
}
QUICK = ("halves exchanged", "norms exchanged", "halves exchanged where they are apart")


@pytest.mark.parametrize(
    "fault", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_faults_in_files_are_named(source: Callable[..., Path], tmp_path: Path, pool: RankPool, fault: str) -> None:
    kind, change, place, tensor = FAULTS[fault]
    model = source(kind)
    convert(model, tmp_path / "meg", to="torch", spec="local", grid=Parallelism(1, 2))
    rewrite(shards(tmp_path / "meg")[-1], lambda content: change(content["model"]))
    report = predicted(model, tmp_path / "meg", pool)
    assert not report.passed and report.location is not None
    assert report.location.place == f"multi-token prediction layer 0 {place}", report.location
    assert any(tensor in name for name in report.location.tensors), report.location.tensors
    plain = Side(model, "hf"), Side(tmp_path / "meg", "megatron")
    assert verify_logits(*plain, greedy=0, pool=pool, device="cpu").passed  # no other logits depend on them


def test_another_choice_of_experts_is_seen(source: Callable[..., Path], tmp_path: Path, pool: RankPool) -> None:
    """Ranks run the experts that the reference chose, so that only their own choice tells."""
    change = changed(f"{INNER}mlp.router.expert_bias", lambda bias: bias * 0)
    convert(source("glm4_moe"), tmp_path / "meg", to="torch", spec="local")
    rewrite(shards(tmp_path / "meg")[-1], lambda content: change(content["model"]))
    report = predicted(source("glm4_moe"), tmp_path / "meg", pool)
    assert not report.passed and "beyond the noise: in layer 4" in report.summary


def test_another_number_of_layers_is_said(source: Callable[..., Path], tmp_path: Path, pool: RankPool) -> None:
    convert(source("glm4_moe"), tmp_path / "meg", to="torch")
    with pytest.raises(InputError, match="1 layers of multi-token prediction, and 2 are asked for"):
        predicted(source("glm4_moe", 2), tmp_path / "meg", pool, 2)


def test_weights_that_the_reference_lacks_are_named(tmp_path: Path, pool: RankPool) -> None:
    from safetensors.torch import load_file, save_file

    model = add_prediction(save_model(tmp_path / "hf", "glm4_moe"))
    convert(model, tmp_path / "meg", to="torch")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.4.hnorm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"do not fit: missing: .*hnorm"):
        predicted(model, tmp_path / "meg", pool)


# In the rank ----------------------------------------------------------------------------------------------------------


def _patched(name: str, new: Callable[[Any], Any]) -> Callable[..., Any]:
    """An opener that exchanges a function of `megatron.prediction`'s caller for another one."""

    def opened(path: str, **options: Any) -> Any:
        from ckptkit.megatron import model

        if not hasattr(model, "_sound"):
            model._sound = model.predicted_states  # type: ignore[attr-defined]
        model.predicted_states = new(model._sound)  # type: ignore[attr-defined]
        return open_checkpoint(path, **options)

    return opened


def _unshifted(right: Any) -> Any:
    """The embedding of the token itself, and not of the one behind it."""

    def states(block: Any, embedding: Any, tokens: Any, positions: Any, states: Any, **options: Any) -> Any:
        return right(block, embedding, tokens.roll(1, -1), positions, states, **options)

    return states


def _shifted_twice(right: Any) -> Any:
    def states(block: Any, embedding: Any, tokens: Any, positions: Any, states: Any, **options: Any) -> Any:
        return right(block, embedding, tokens.roll(-1, -1), positions, states, **options)

    return states


unshifted = _patched("unshifted", _unshifted)
shifted_twice = _patched("shifted_twice", _shifted_twice)
sound = _patched("sound", lambda right: right)


def test_a_wrong_shift_is_seen(source: Callable[..., Path], tmp_path: Path, one_rank: RankPool) -> None:
    model = source("glm4_moe")
    convert(model, tmp_path / "meg", to="torch")
    for fault in ("unshifted", "shifted_twice"):
        report = predicted(model, tmp_path / "meg", one_rank, opener=MODULE + fault)
        assert not report.passed and report.location is not None
        assert report.location.place == "multi-token prediction layer 0 embedding norm"
    assert predicted(model, tmp_path / "meg", one_rank, opener=MODULE + "sound").passed


# The formula ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTS)
def test_the_reference_follows_the_published_formula(source: Callable[..., Path], kind: str) -> None:
    """h' = norm(layer(W [norm(embedding of the next token); norm(h)])), read from the files by hand.

    The decoder layer is that of transformers; all around it is computed here, in float64.
    """
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file

    from ckptkit.verification.prediction import Prediction
    from ckptkit.verification.reference import load_model

    path = source(kind, 2)
    tensors, raw = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    model = load_model(path, torch.float32)
    first, found = raw["num_hidden_layers"], Prediction(model, path, 2, {})
    tokens = torch.randint(raw["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(3))

    def normed(states: Any, name: str) -> Any:
        wide = states.double()
        return wide / (wide.square().mean(-1, keepdim=True) + raw["rms_norm_eps"]).sqrt() * tensors[name].double()

    def layer(number: int, states: Any) -> Any:
        """The decoder layer, in a model of which it is the last one."""
        inner = found.model.layers[number].mtp_block
        positions = torch.arange(tokens.size(1))[None]
        angles = model.get_decoder().rotary_emb(states, positions)
        mask = torch.full((12, 12), -torch.inf).triu(1)[None, None]
        output = inner(states, attention_mask=mask, position_embeddings=angles, position_ids=positions)
        return output[0] if isinstance(output, tuple) else output

    with torch.no_grad():
        states = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        following = tokens
        for number in range(2):
            block = f"model.layers.{first + number}."
            following = F.pad(following[:, 1:], (0, 1))
            embedded = tensors["model.embed_tokens.weight"][following]
            halves = normed(embedded, f"{block}enorm.weight"), normed(states, f"{block}hnorm.weight")
            joined = torch.cat(halves, -1) @ tensors[f"{block}eh_proj.weight"].double().T
            states = normed(layer(number, joined.float()), f"{block}shared_head.norm.weight").float()
        expected = states.double() @ tensors["lm_head.weight"].double().T
        logits = found.logits(tokens)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    for name in ("q_a_proj", "gate_up_proj", "e_score_correction_bias", "kv_b_proj", "k_proj"):
        loaded = dict(found.model.layers[1].named_parameters()) | dict(found.model.layers[1].named_buffers())
        for key, value in loaded.items():
            if name in key and name != "gate_up_proj":
                stored = tensors[f"model.layers.{first + 1}.{key.removeprefix('mtp_block.')}"]
                assert torch.equal(value, stored)


@pytest.mark.parametrize("kind", ["qwen3_next", pytest.param("qwen3_5_text", marks=pytest.mark.slow)])
def test_the_reference_follows_the_formula_of_a_layer_that_is_apart(source: Callable[..., Path], kind: str) -> None:
    """The same, with norms that multiply by one plus their weight (source: `Qwen3NextMultiTokenPredictor` of vLLM)."""
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file

    from ckptkit.verification.prediction import Prediction
    from ckptkit.verification.reference import load_model

    path = source(kind)
    tensors, raw = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    model = load_model(path, torch.float32)
    found = Prediction(model, path, 1, {})
    inner = found.model.layers[0].mtp_block
    assert found.first is None
    stored = {name: value for name, value in tensors.items() if name.startswith("mtp.layers.0.")}
    loaded = {f"mtp.layers.0.{name}": value for name, value in inner.named_parameters()}
    assert {name for name in loaded if ".experts." not in name} <= stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in loaded.items() if ".experts." not in name)
    tokens = torch.randint(raw["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(3))

    def normed(states: Any, name: str) -> Any:
        wide = states.double()
        weight = 1 + tensors[f"mtp.{name}.weight"].double()
        return wide / (wide.square().mean(-1, keepdim=True) + raw["rms_norm_eps"]).sqrt() * weight

    with torch.no_grad():
        states = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        embedded = tensors["model.embed_tokens.weight"][F.pad(tokens[:, 1:], (0, 1))]
        halves = normed(embedded, "pre_fc_norm_embedding"), normed(states, "pre_fc_norm_hidden")
        joined = (torch.cat(halves, -1) @ tensors["mtp.fc.weight"].double().T).float()
        positions = torch.arange(12)[None]
        angles = model.get_decoder().rotary_emb(joined, positions)
        mask = torch.full((12, 12), -torch.inf).triu(1)[None, None]
        output = inner(joined, attention_mask=mask, position_embeddings=angles, position_ids=positions)
        states = normed(output[0] if isinstance(output, tuple) else output, "norm")
        expected = states @ tensors["lm_head.weight"].double().T
        logits = found.logits(tokens)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_layer_apart_that_lacks_an_expert_is_named(tmp_path: Path, pool: RankPool) -> None:
    from safetensors.torch import load_file, save_file

    from ckptkit.verification.prediction import Prediction
    from ckptkit.verification.reference import load_model

    model = add_prediction(save_model(tmp_path / "hf", "qwen3_next"))
    tensors = load_file(model / "model.safetensors")
    del tensors["mtp.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    import torch

    with pytest.raises(InputError, match=r"do not fit: missing: .*experts"):
        Prediction(load_model(model, torch.float32), model, 1, {})


def test_a_model_whose_last_layer_has_no_attention_is_refused(tmp_path: Path) -> None:
    import torch

    from ckptkit.errors import UnsupportedError
    from ckptkit.verification.prediction import Prediction
    from ckptkit.verification.reference import load_model

    types = ["full_attention", "linear_attention", "full_attention", "linear_attention"]
    model = add_prediction(save_model(tmp_path / "hf", "qwen3_5_text", layer_types=types))
    with pytest.raises(UnsupportedError, match="like the model's last layer, which has no attention"):
        Prediction(load_model(model, torch.float32), model, 1, {})
