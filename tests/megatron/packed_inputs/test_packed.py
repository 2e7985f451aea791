"""Packed inputs against transformers run on each sequence alone, on one rank."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptkit
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.sharding.grid import Parallelism
from tests.models import LLAMAS, MODELS, llama_config, model_classes, model_config, randomise
from tests.precision import relative_error

KINDS = ["gqa", "tied", "llama3", "biased", *MODELS]
ROWS = [[5, 6, 7, 8, 9] * 8, [9], [], [10, 11, 12], list(range(100, 133))]
EXACT = 1e-5


def hf_model(kind: str, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    if kind in LLAMAS:
        model = transformers.LlamaForCausalLM(llama_config(kind, **changes))
    else:
        model = model_classes(kind)[1](model_config(kind, **changes))
    randomise(model)
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def alone(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Logits of every sequence run by itself, one after the other."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows if row])


def packed(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, int]:
    lengths = torch.tensor([0, *map(len, rows)])
    return (
        torch.tensor([token for row in rows for token in row], dtype=torch.int64),
        lengths.cumsum(0).to(torch.int32),
        int(lengths.max()),
    )


@pytest.fixture
def tiny(one_rank: Parallelism) -> tuple[Any, Any]:
    """A windowed model and its packed form."""
    model = hf_model("mistral", num_hidden_layers=2, sliding_window=4)
    return model, ckptkit.convert_to_packed(model)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_are_those_of_transformers(one_rank: Parallelism, kind: str) -> None:
    model = hf_model(kind)
    runtime = ckptkit.convert_to_packed(model)
    with torch.no_grad():
        found = runtime(*packed(ROWS))
    expected = alone(model, ROWS)
    # transformers, too, rounds where it computes in fp32: its own error in the deepest models is a few units of 1e-6.
    assert relative_error(found, expected) < EXACT
    state = model.state_dict()
    back = runtime.to_hf_state_dict()
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype for name in state)
    assert not {value.data_ptr() for value in back.values()} & {value.data_ptr() for value in state.values()}


def test_the_weights_of_a_trained_packed_model_go_back(tiny: tuple[Any, Any]) -> None:
    model, runtime = tiny
    with torch.no_grad():
        for parameter in runtime.parameters():
            parameter.normal_()
    model.load_state_dict(runtime.to_hf_state_dict())
    with torch.no_grad():
        assert relative_error(runtime(*packed(ROWS)), alone(model, ROWS)) < EXACT


def test_half_precision_comes_back_bit_by_bit(one_rank: Parallelism) -> None:
    model = hf_model("qwen3_moe").to(torch.bfloat16)
    runtime = ckptkit.convert_to_packed(model)
    assert {parameter.dtype for parameter in runtime.parameters()} == {torch.bfloat16}
    back = runtime.to_hf_state_dict()
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())


def test_gradients_are_those_of_transformers(tiny: tuple[Any, Any]) -> None:
    model, runtime = tiny
    torch.manual_seed(1)
    direction = torch.randn(sum(map(len, ROWS)), 250)
    (runtime(*packed(ROWS)) * direction).sum().backward()
    start = 0
    for row in ROWS:
        if row:
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
            (logits * direction[start : start + len(row)]).sum().backward()
            start += len(row)
    gradients = runtime.to_hf_state_dict({name: value.grad for name, value in runtime.named_parameters()})
    for name, parameter in model.named_parameters():
        assert relative_error(gradients[name], parameter.grad) < EXACT, name


MASKS: dict[str, list[list[int]]] = {
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
    "both": [[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]],
    "holes": [[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 1]],
    "an all-padding row": [[0] * 6, [1, 1, 1, 1, 0, 0], [0] * 6],
    "none": [[1] * 6, [1] * 6],
    "nothing but padding": [[0] * 6],
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padded_inputs(tiny: tuple[Any, Any], case: str, dtype: torch.dtype) -> None:
    model, runtime = tiny
    mask = torch.tensor(MASKS[case])
    tokens = torch.randint(0, 250, mask.shape)
    with torch.no_grad():
        found = runtime(tokens, attention_mask=mask.to(dtype))
    assert found.shape == (*mask.shape, 250)
    assert not found[mask == 0].any()
    visible = [row[keep.bool()].tolist() for row, keep in zip(tokens, mask, strict=True)]
    if any(visible):
        assert relative_error(found[mask == 1], alone(model, visible)) < EXACT


def test_without_a_mask_nothing_is_padding(tiny: tuple[Any, Any]) -> None:
    model, runtime = tiny
    tokens = torch.randint(0, 250, (2, 7))
    with torch.no_grad():
        assert relative_error(runtime(tokens), model(input_ids=tokens, use_cache=False).logits) < EXACT


@pytest.mark.parametrize("rows", [[[7]], [[7], [8]], [[], [], [3, 4]], [[1, 2], []]])
def test_small_batches(tiny: tuple[Any, Any], rows: list[list[int]]) -> None:
    model, runtime = tiny
    with torch.no_grad():
        assert relative_error(runtime(*packed(rows)), alone(model, rows)) < EXACT


def test_bounds_of_either_type_are_the_same(tiny: tuple[Any, Any]) -> None:
    """`cumsum` of lengths gives int64, and kernels take int32."""
    tokens, bounds, longest = packed([[3, 1, 4], [1, 5], [9, 2, 6, 5]])
    with torch.no_grad():
        assert torch.equal(tiny[1](tokens, bounds.long(), longest), tiny[1](tokens, bounds, longest))
        assert torch.equal(tiny[1](tokens, bounds.long()), tiny[1](tokens, bounds, longest))


@pytest.mark.parametrize("rows", [[], [[]], [[], []]])
def test_empty_batches(tiny: tuple[Any, Any], rows: list[list[int]]) -> None:
    tokens, bounds, longest = torch.zeros(0, dtype=torch.int64), torch.zeros(len(rows) + 1, dtype=torch.int32), 0
    with torch.no_grad():
        assert tiny[1](tokens, bounds, longest).shape == (0, 250)


def test_a_sequence_beyond_4096_tokens(one_rank: Parallelism) -> None:
    model = hf_model("mistral", num_hidden_layers=1, max_position_embeddings=8192, sliding_window=4096)
    rows = [torch.arange(4200).remainder(250).tolist(), [1, 2, 3]]
    with torch.no_grad():
        found = ckptkit.convert_to_packed(model)(*packed(rows))
    assert relative_error(found, alone(model, rows)) < EXACT


def test_a_window_does_not_cross_a_boundary(tiny: tuple[Any, Any]) -> None:
    """The window is 4: tokens 1 to 3 of the second sequence could see the first one's end."""
    _, runtime = tiny
    tokens, bounds, longest = packed([[5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 24, 25, 26, 27, 28]])
    other = tokens.clone()
    other[:6] += 100
    with torch.no_grad():
        first, second = runtime(tokens, bounds, longest), runtime(other, bounds, longest)
        leaking = [runtime(ids, torch.tensor([0, 15], dtype=torch.int32), 15) for ids in (tokens, other)]
    assert relative_error(first[6:], second[6:]) < EXACT
    # The same model does see across where no boundary is stated, as far as two layers of the window reach.
    assert relative_error(leaking[0][6:12], leaking[1][6:12]) > 1e-2
    assert relative_error(leaking[0][12:], leaking[1][12:]) < EXACT


def test_sequences_do_not_depend_on_their_neighbours(one_rank: Parallelism) -> None:
    runtime = ckptkit.convert_to_packed(hf_model("qwen3_moe"))
    row = [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.no_grad():
        single = runtime(*packed([row]))
        between = runtime(*packed([[7] * 20, row, [8] * 5]))[20:28]
    assert relative_error(between, single) < EXACT


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.zeros(5).long(), torch.tensor([0.0, 5.0]), 5), "int32 or int64"),
        ((torch.zeros(5).long(), torch.tensor([0, 1 << 32 | 5]), 5), "rise from 0 to the number of tokens, 5"),
        ((torch.zeros(5).long(), torch.tensor([0, 4], dtype=torch.int32), 5), "rise from 0 to the number of tokens, 5"),
        ((torch.zeros(5).long(), torch.tensor([0, 3, 2, 5], dtype=torch.int32), 5), "rise"),
        ((torch.zeros(5).long(), torch.tensor([1, 5], dtype=torch.int32), 5), "rise"),
        ((torch.zeros(5).long(), torch.tensor([0, 5], dtype=torch.int32), 4), "max_seqlen is 4"),
        ((torch.zeros(1, 5).long(), torch.tensor([0, 5], dtype=torch.int32), 5), "one axis"),
        ((torch.zeros(5).long(), torch.zeros(0, dtype=torch.int32), 5), "batch"),
        ((torch.zeros(5).long(),), "axes"),
        ((torch.zeros(1, 5).long(), None, 5), "without cu_seqlens"),
    ],
)
def test_packed_arguments_are_checked(tiny: tuple[Any, Any], arguments: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        tiny[1](*arguments)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(2, 4), r"attention_mask is \[2, 4\]"),
        (torch.ones(1, 1, 5, 5), "one number for each token"),
        (torch.tensor([[0.0, -1e9, 0.0, 0.0, 0.0]]), "0 and 1 only"),
        (torch.tensor([[0, 2, 1, 1, 1]]), "0 and 1 only"),
    ],
)
def test_masks_are_checked(tiny: tuple[Any, Any], mask: torch.Tensor, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        tiny[1](torch.zeros(1, 5).long(), attention_mask=mask)
    with pytest.raises(UsageError, match="no attention_mask"):
        tiny[1](*packed([[1, 2]]), attention_mask=mask)


@settings(max_examples=60)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6), st.integers(1, 4))
def test_unpadding_and_padding_are_inverse(rows: list[list[bool]], multiple: int) -> None:
    from ckptkit.megatron.packed_inputs.batch import pad, unpad

    mask = torch.tensor(rows)
    tokens = torch.arange(1, mask.numel() + 1).view(mask.shape)
    batch, places = unpad(tokens, mask)
    assert batch.lengths == [sum(row) for row in rows]
    assert batch.input_ids.tolist() == tokens[mask].tolist()
    assert batch.positions.tolist() == [position for row in rows for position in range(sum(row))]
    assert torch.equal(pad(batch.input_ids, places, *mask.shape), tokens * mask)
    filled = batch.filled(multiple)
    assert filled.total % multiple == 0 and filled.total > 0 and filled.total - batch.total < multiple + 1
    assert filled.bounds[: len(batch.bounds)] == batch.bounds
    assert torch.equal(filled.input_ids[: batch.total], batch.input_ids)


def damaged_head(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)


DAMAGES: dict[str, tuple[str, Callable[[Any], None], type[Exception], str]] = {
    "a tied head that is not": ("tied", damaged_head, InputError, "lm_head.weight repeats"),
    "another dtype": ("gqa", lambda model: model.model.norm.double(), InputError, "most of the model is F32"),
    "no weights": ("gqa", lambda model: model.to("meta"), UsageError, "on meta"),
    "an unknown tensor": (
        "gqa",
        lambda model: model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1))),
        InputError,
        "unknown to this family: extra",
    ),
    "a missing tensor": ("gqa", lambda model: delattr(model.model, "norm"), InputError, "missing: model.norm.weight"),
    "another shape": (
        "gqa",
        lambda model: setattr(model.model.norm, "weight", torch.nn.Parameter(torch.ones(95))),
        InputError,
        r"\[95\], the config says \[96\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_models_that_are_not_what_they_say(one_rank: Parallelism, damage: str) -> None:
    kind, change, kind_of_error, text = DAMAGES[damage]
    model = hf_model(kind)
    change(model)
    with pytest.raises(kind_of_error, match=text):
        ckptkit.convert_to_packed(model)


def test_what_is_no_input(tiny: tuple[Any, Any]) -> None:
    _, runtime = tiny
    ids, bounds, longest = packed(ROWS)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(UsageError, match=r"input_ids are token ids, int64, not (float32|bool)"):
            runtime(ids.to(dtype), bounds, longest)
    with pytest.raises(UsageError, match="input_ids must be a tensor, not a list"):
        runtime(ids.tolist(), bounds, longest)
    with pytest.raises(UsageError, match="cu_seqlens must be a tensor, not a list"):
        runtime(ids, bounds.tolist(), longest)
    for other in ("a path", {"model": 1}, torch.nn.Linear(2, 2)):
        with pytest.raises(UsageError, match=r"takes a model of transformers, not a (str|dict|Linear)"):
            ckptkit.convert_to_packed(other)


def test_other_architectures_are_refused(one_rank: Parallelism) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel"):
        ckptkit.convert_to_packed(model)


def test_states_that_do_not_fit_are_refused(tiny: tuple[Any, Any]) -> None:
    _, runtime = tiny
    state = dict(runtime.state_dict())
    name = "model.decoder.final_layernorm.weight"
    for change, text in (
        ({name: None}, "missing: decoder.final_layernorm.weight"),
        ({"other": torch.zeros(1)}, "unexpected: other"),
        ({name: torch.zeros(3)}, "another shape: decoder.final_layernorm.weight"),
    ):
        wrong = {
            key: value for key, value in {**state, **change}.items() if key not in change or change[key] is not None
        }
        with pytest.raises(InputError, match=text):
            runtime.to_hf_state_dict(wrong)


def test_the_model_is_free_of_its_origin(tiny: tuple[Any, Any]) -> None:
    model, runtime = tiny
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in runtime.to_hf_state_dict().items())


def test_values_and_their_gradients(one_rank: Parallelism) -> None:
    from transformers import LlamaForTokenClassification

    torch.manual_seed(0)
    model = LlamaForTokenClassification(llama_config("gqa", num_hidden_layers=2, num_labels=1)).eval()
    randomise(model)
    runtime = ckptkit.convert_to_packed(model)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = mask[1, 6:] = 0
    tokens = torch.randint(0, 250, mask.shape)
    values = runtime(tokens, attention_mask=mask)
    assert values.shape == (3, 9, 1)
    values.sum().backward()
    expected = torch.zeros_like(values)
    for number, (row, visible) in enumerate(zip(tokens, mask.bool(), strict=True)):
        states = model.model(input_ids=row[visible][None], use_cache=False).last_hidden_state
        expected[number, visible] = model.score(states)[0]
    expected.sum().backward()
    assert relative_error(values, expected) < EXACT
    gradients = runtime.to_hf_state_dict({name: value.grad for name, value in runtime.named_parameters()})
    for name, parameter in model.named_parameters():
        assert relative_error(gradients[name], parameter.grad) < EXACT, name


@pytest.mark.parametrize("kind", ["gqa", "gemma3_text", "gemma4_text-dense", "gemma4_text-e2b", "gemma4_text-moe"])
def test_fsdp2_in_mixed_precision(one_rank: Parallelism, kind: str) -> None:
    """fp32 weights that compute in bf16, and differ from those that compute in fp32 by little."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from ckptkit.megatron.packed_inputs.model import shard

    model = hf_model(kind)
    expected = alone(model, ROWS)
    runtime = shard(ckptkit.convert_to_packed(model), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in runtime.parameters()} == {torch.float32}
    used: set[torch.dtype] = set()
    for module in runtime.modules():
        module.register_forward_pre_hook(lambda module, _: used.update(x.dtype for x in module.parameters(False)))
    with torch.no_grad():
        found = runtime(*packed(ROWS))
    assert used == {torch.bfloat16} == {found.dtype}
    # Half of the positions: a token that another expert gets may be far off.
    errors = (found.float() - expected).square().mean(-1).sqrt()
    assert errors.median() < 0.1 * expected.square().mean().sqrt()


def test_fsdp2_gives_the_same_logits_and_its_checkpoint_goes_back(one_rank: Parallelism, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    from ckptkit.megatron.packed_inputs.model import shard

    model = hf_model("tied", num_hidden_layers=2)
    runtime = ckptkit.convert_to_packed(model)
    expected = alone(model, ROWS)
    shard(runtime)
    assert all(isinstance(parameter, DTensor) for parameter in runtime.parameters())
    with torch.no_grad():
        assert relative_error(runtime(*packed(ROWS)), expected) < EXACT
    state = model.state_dict()
    for weights in (None, get_model_state_dict(runtime, options=StateDictOptions(full_state_dict=True))):
        back = runtime.to_hf_state_dict(weights)
        assert all(torch.equal(back[name], value) for name, value in state.items())
    dcp.save(get_model_state_dict(runtime), checkpoint_id=tmp_path / "dcp")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    )
    ckptkit.convert(tmp_path / "dcp", tmp_path / "out", to="hf", hf_reference=tmp_path / "hf")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == state.keys() - {"lm_head.weight"}
    assert all(torch.equal(value, state[name]) for name, value in stored.items())
