"""Layers of multi-token prediction: decoder layers behind the last one, with a projection in front and a norm behind.

Hugging Face numbers them as if they followed the model's own layers (`model.layers.61.` of a model with 61 layers), and
its files may repeat the embedding and the head in each. Megatron has them in a block of their own on the last pipeline
stage, with a copy of the embedding where that is not the first. A checkpoint may hold none although its config.json
counts some: transformers leaves them out of what it saves, and many trainers do not train them.

Megatron-Core calls the decoder layer inside `transformer_layer` up to 0.18 and in every distributed checkpoint, and
`mtp_model_layer` in the files of ranks since 0.19. Source: `MultiTokenPredictionLayer` of megatron-core 0.16.1 and
0.19.2; `MtpLayer` of transformers, which joins the normalised embedding and hidden state in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from ckptkit.sharding.rules import COLUMN
from ckptkit.tables.dims import D
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.rows import HF_LAYER, MEGATRON_LAYER, Replica, Row, always, once

MAX_LAYERS = 16
"""Layers that are looked for; released models have one to three."""
_BLOCK, _INNER, _INNER_OF_0_19 = "mtp.layers.{m}.", "transformer_layer.", "mtp_model_layer."
_MEGATRON = re.compile(r"(?:^|(?<=\.))mtp\.layers\.([0-9]{1,4})\.")
_HF = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.")
_OF_0_16 = re.compile(rf"((?:^|.*\.)mtp\.layers\.[0-9]+\.){re.escape(_INNER)}")
_OF_0_19 = re.compile(rf"((?:^|.*\.)mtp\.layers\.[0-9]+\.){re.escape(_INNER_OF_0_19)}(?!layers\.)")

ROWS = (
    once(f"{_BLOCK}enorm.weight", f"{HF_LAYER}enorm.weight", (D,)),
    once(f"{_BLOCK}hnorm.weight", f"{HF_LAYER}hnorm.weight", (D,)),
    once(f"{_BLOCK}eh_proj.weight", f"{HF_LAYER}eh_proj.weight", (D, 2 * D), COLUMN),
    once(f"{_BLOCK}final_layernorm.weight", f"{HF_LAYER}shared_head.norm.weight", (D,)),
)
"""The rows of such a layer beside those of the decoder layer in it."""


def rows_of(rows: Iterable[Row], config: ModelConfig, count: int) -> Iterator[Row]:
    """The rows of `count` layers of multi-token prediction, with their numbers in them.

    Args:
        rows: The rows of the family.
        config: The model.
        count: Number of layers.
    """
    layer = config.layers[-1]
    own = [row for row in rows if row.megatron.startswith(MEGATRON_LAYER) and row.when(config, layer)]
    for number in range(count):
        block = _BLOCK.format(m=number)
        for row in (*ROWS, *own):
            name = row.megatron.replace(_BLOCK, block).replace(MEGATRON_LAYER, block + _INNER)
            hf = {name.replace("{i}", str(config.num_layers + number)): shape for name, shape in row.hf.items()}
            yield replace(row, megatron=name, hf=hf, when=always)


def every_row(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of such a layer in any model of a family, with Megatron's names alone, for names without numbers."""
    for row in (*ROWS, *(row for row in rows if row.megatron.startswith(MEGATRON_LAYER))):
        block = _BLOCK.format(m=0)
        yield replace(row, megatron=row.megatron.replace(_BLOCK, block).replace(MEGATRON_LAYER, block + _INNER), hf={})


def copies_of(config: ModelConfig) -> Iterator[Replica]:
    """The copies of the embedding and of the head that files may hold in these layers."""
    for number in range(config.num_layers, config.num_layers + config.mtp_layers):
        layer = HF_LAYER.format(i=number)
        yield Replica(f"{layer}embed_tokens.weight", of="model.embed_tokens.weight", when=lambda config: True)
        yield Replica(f"{layer}shared_head.head.weight", of="lm_head.weight", when=lambda config: True)


def count_in_hf(names: Iterable[str], num_layers: int) -> int:
    """The number of layers of multi-token prediction with tensors of these Hugging Face names."""
    numbers = {int(match[1]) - num_layers for name in names if (match := _HF.match(name))}
    return max((number + 1 for number in numbers if 0 <= number < MAX_LAYERS), default=0)


def count_in_megatron(names: Collection[str]) -> int:
    """The number of layers of multi-token prediction with tensors of these Megatron names."""
    return max((int(match[1]) + 1 for name in names if (match := _MEGATRON.search(name))), default=0)


def is_prediction(key: str) -> bool:
    """Whether a Megatron tensor belongs to a layer of multi-token prediction."""
    return number_of(key) is not None


def number_of(key: str) -> int | None:
    """The number, from 0, of the layer of multi-token prediction that a Megatron tensor belongs to, if any."""
    match = _MEGATRON.search(key)
    return None if match is None else int(match[1])


def generic(template: str) -> str:
    """The Hugging Face template of decoder layers that one of a layer of multi-token prediction follows from."""
    return _HF.sub(lambda match: HF_LAYER, template, count=1)


RELEASES = CORE_0_16, CORE_0_19 = ("0.16", "0.19")
"""Releases of Megatron-Core from which on the ranks have other names."""


def of_0_19(name: str) -> str:
    """The inverse of `of_0_16`."""
    return _OF_0_16.sub(rf"\1{_INNER_OF_0_19}", name)


def of_0_16(name: str) -> str:
    """A name as a rank of Megatron-Core 0.19 has it -> the name that distributed checkpoints and 0.16 have."""
    return _OF_0_19.sub(rf"\1{_INNER}", name)
