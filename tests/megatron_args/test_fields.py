"""The table of Megatron's fields: its names are Megatron's own, and each row is written and read where it says."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from ckptkit.families import family_of
from ckptkit.families.llama import LLAMA
from ckptkit.megatron_args import fields as table
from ckptkit.megatron_args.fields import FIELDS, GRID_FIELDS, Field, fields_of, of_model, written
from ckptkit.megatron_args.kinds import (
    COUNT,
    COUNT_OR_NONE,
    COUNT_OR_ZERO,
    FACTOR,
    FLAG,
    GROUPS,
    NUMBER,
    POSITIVE_OR_NONE,
    SCORE,
    SOFTMAX_TYPE,
)
from ckptkit.megatron_args.reading import from_args
from ckptkit.megatron_args.writing import to_args
from ckptkit.sharding.grid import Parallelism
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from tests.checkpoints.test_stored_args import MEGATRON_0_19
from tests.megatron_args.test_strict_config import BASE, MOE
from tests.models import MODELS, raw_config

BEFORE_0_19 = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}
OF_THE_PARSER_ALONE = {"softmax_scale", "virtual_pipeline_model_parallel_size"}
"""Arguments of Megatron-LM that its parser leaves unset for the tiny Llama of `MEGATRON_0_19`."""
OF_PROVIDERS_ALONE = {
    "seq_length",
    "position_embedding_type",
    "rotary_percent",
    "share_embeddings_and_output_weights",
}
"""What the constructor of GPTModel is given beside a `TransformerConfig`."""
ROWS = [field for field in FIELDS if field.ours is not None and field.args is not None]
OTHER: dict[Any, Any] = {
    COUNT: 1,
    COUNT_OR_ZERO: 24,
    COUNT_OR_NONE: 1,
    NUMBER: 0.25,
    FACTOR: 2.0,
    GROUPS: 2,
    SCORE: "softmax",
    SOFTMAX_TYPE: False,
    POSITIVE_OR_NONE: 3.0,
}
SCORED = {
    "router_score": "sigmoid",
    "router_groups": 4,
    "router_groups_chosen": 4,
    "shared_expert_size": 16,
    "shared_expert_gate": True,
    "mtp_layers": 2,
}
"""A model whose arguments have every row, but for those of the next two."""
GATED = {"output_gate": True}
CLAMPED = {"sinks": True, "activation_clamp": 7.0, "up_offset": 1.0}


def core_names(*, latent: bool = False) -> set[str]:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    return {field.name for field in dataclasses.fields(MLATransformerConfig if latent else TransformerConfig)}


def strangers(fields: tuple[Field, ...], names: set[str]) -> set[str]:
    """Names of the table in `TransformerConfig` and in providers that Megatron does not have."""
    core = {field.core for field in fields if field.core is not None} - names
    return core | {field.provider for field in fields if field.provider is not None} - names - OF_PROVIDERS_ALONE


def test_names_are_those_of_the_installed_megatron_core() -> None:
    names = core_names()
    of_latent = set(table.LATENT_FIELDS)
    assert strangers(tuple(field for field in FIELDS if field not in of_latent), names) == set()
    assert strangers(table.LATENT_FIELDS, core_names(latent=True)) == set()
    assert {field.core for field in GRID_FIELDS} <= names
    assert not OF_PROVIDERS_ALONE & names
    assert strangers((of_model(COUNT, "hidden_size", core="hidden_sizes"),), names) == {"hidden_sizes"}


def test_names_are_arguments_of_megatron_lm() -> None:
    args = {field.args for field in (*FIELDS, *GRID_FIELDS)} - {None}
    assert args - MEGATRON_0_19.keys() == BEFORE_0_19.keys() | OF_THE_PARSER_ALONE
    assert set(BEFORE_0_19.values()) <= MEGATRON_0_19.keys()


def test_no_place_has_two_rows_for_a_name() -> None:
    for place in ("args", "core", "provider"):
        names = Counter(getattr(field, place) for field in FIELDS)
        del names[None]
        assert set(names.values()) == {1}


def test_rows_that_are_read_are_of_fields() -> None:
    for row in ROWS:
        assert row.of is not None and row.kind is not None
        assert row.ours in {field.name for field in dataclasses.fields(row.of)}


def changed(config: ModelConfig, row: Field) -> ModelConfig:
    """A model that differs in what a row records."""
    assert row.ours is not None
    of_layers = row.of is LayerConfig
    value = not getattr(config, row.ours) if row.kind is FLAG else OTHER[row.kind]
    change = {row.ours: value}
    if not of_layers:
        return replace(config, **change)
    return replace(config, layers=tuple(replace(layer, **change) for layer in config.layers))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.args)
def test_a_row_is_written_and_read(row: Field) -> None:
    of_experts = (*table.SCORE_FIELDS, *table.SHARED_EXPERT_FIELDS, *table.SHARED_GATE_FIELDS)
    scored = SCORED if row in (*of_experts, *table.PREDICTION_FIELDS) else {}
    scored = CLAMPED if row in table.BEYOND_PLAIN_FIELDS else GATED if row in table.GATE_FIELDS else scored
    base = replace(BASE, **MOE, **scored, layers=tuple(replace(layer, moe=True) for layer in BASE.layers))
    other = changed(base, row)
    before, after = (to_args(LLAMA, config, Parallelism(), 128, 128) for config in (base, other))
    value = after.get(row.args, False)  # a flag that stands for nothing is not written
    assert before[row.args] != value
    assert from_args(LLAMA, {**before, row.args: value}, base) == other
    for place in ("core", "provider"):
        if (name := getattr(row, place)) is not None:
            first, second = (written(fields_of(config), place, config, config.layers[0]) for config in (base, other))
            assert first[name] != second.get(name)


def test_a_new_field_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (*table.CORE_FIELDS, of_model(NUMBER, "attention_softcap", "attention_cap"))
    base = replace(BASE, attention_softcap=50.0)
    assert "attention_cap" not in to_args(LLAMA, base, Parallelism(), 128, 128)
    for module in ("fields", "reading"):
        monkeypatch.setattr(f"ckptkit.megatron_args.{module}.CORE_FIELDS", rows)
    args = to_args(LLAMA, base, Parallelism(), 128, 128)
    assert args["attention_cap"] == 50.0
    assert from_args(LLAMA, {**args, "attention_cap": 30}, base) == replace(base, attention_softcap=30.0)
    for place in ("core", "provider"):
        assert written(fields_of(base), place, base, base.layers[0])["attention_cap"] == 50.0


@pytest.mark.parametrize("kind", MODELS)
def test_a_transformer_config_has_the_values_of_the_table(kind: str) -> None:
    import torch

    from ckptkit.megatron.config import layer_config, transformer_config

    raw = raw_config(kind)
    config = family_of(raw, kind).parse(raw)
    grid = Parallelism(2, 2, ep=2 if config.num_experts else 1)
    base = transformer_config(config, grid, dtype=torch.float32, device=torch.device("cpu"))
    expected = written(fields_of(config), "core", config, config.layers[0])
    assert {name: getattr(base, name) for name in expected} == expected
    assert {field.core: getattr(base, field.core) for field in GRID_FIELDS} == {
        field.core: field.value(grid) for field in GRID_FIELDS
    }
    for layer in config.layers:
        sized = layer_config(base, layer, config.activation)
        assert (sized.num_attention_heads, sized.num_query_groups) == (layer.num_heads, layer.num_kv_heads)
        assert (sized.kv_channels, sized.ffn_hidden_size) == (layer.head_dim, layer.ffn_hidden_size)
