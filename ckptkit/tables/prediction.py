"""Layers of multi-token prediction: decoder layers behind the last one, with a projection in front and a norm behind.

Most Hugging Face archives number them as if they followed the model's own layers (`model.layers.61.` of a model with 61
layers), and may repeat the embedding and the head in each; others have them apart, under `mtp.`. Megatron has them in a
block of their own on the last pipeline stage, with a copy of the embedding where that is not the first. A checkpoint
may hold none although its config.json counts some: transformers leaves them out of what it saves, and many trainers do
not train them.

Megatron-Core calls the decoder layer inside `transformer_layer` up to 0.18 and in every distributed checkpoint, and
`mtp_model_layer` in the files of ranks since 0.19. Source: `MultiTokenPredictionLayer` of megatron-core 0.16.1 and
0.19.2; `MtpLayer` of transformers, which joins the normalised embedding and hidden state in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from ckptkit.sharding.rules import COLUMN
from ckptkit.tables.dims import D
from ckptkit.tables.model_config import LayerConfig, ModelConfig
from ckptkit.tables.rows import HF_LAYER, MEGATRON_LAYER, Replica, Row, always, once

MAX_LAYERS = 16
"""Layers that are looked for; released models have one to three."""
_BLOCK, _INNER, _INNER_OF_0_19 = "mtp.layers.{m}.", "transformer_layer.", "mtp_model_layer."
_MEGATRON = re.compile(r"(?:^|(?<=\.))mtp\.layers\.([0-9]{1,4})\.")
_HF = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.")
_APART = re.compile(r"mtp\.(?:layers\.([0-9]{1,4})\.)?")
_OF_0_16 = re.compile(rf"((?:^|.*\.)mtp\.layers\.[0-9]+\.){re.escape(_INNER)}")
_OF_0_19 = re.compile(rf"((?:^|.*\.)mtp\.layers\.[0-9]+\.){re.escape(_INNER_OF_0_19)}(?!layers\.)")


@dataclass(frozen=True)
class Archive:
    """How the archives of a family hold such layers.

    Attributes:
        rows: The rows of such a layer beside those of the decoder layer in it.
        layer: Beginning of the Hugging Face names of that decoder layer, with `{m}`; None: it is numbered as if it
            followed the model's own layers.
        most: Layers that an archive can hold.
        copies: Whether it may repeat the embedding and the head in each.
    """

    rows: tuple[Row, ...]
    layer: str | None = None
    most: int = MAX_LAYERS
    copies: bool = True

    def hf_name(self, name: str, number: int, config: ModelConfig) -> str:
        """The Hugging Face name of a tensor in layer `number` of multi-token prediction, from that of its row."""
        if self.layer is None:
            return name.replace("{i}", str(config.num_layers + number))
        _, inside, rest = name.partition(_IN_LAYER)
        return self.layer.format(m=number) + rest if inside else name


_IN_LAYER = ".layers.{i}."
NUMBERED = Archive(
    (
        once(f"{_BLOCK}enorm.weight", f"{HF_LAYER}enorm.weight", (D,)),
        once(f"{_BLOCK}hnorm.weight", f"{HF_LAYER}hnorm.weight", (D,)),
        once(f"{_BLOCK}eh_proj.weight", f"{HF_LAYER}eh_proj.weight", (D, 2 * D), COLUMN),
        once(f"{_BLOCK}final_layernorm.weight", f"{HF_LAYER}shared_head.norm.weight", (D,)),
    )
)
"""DeepSeek-V3 and GLM number these layers behind the others."""
APART = Archive(
    (
        once(f"{_BLOCK}enorm.weight", "mtp.pre_fc_norm_embedding.weight", (D,)),
        once(f"{_BLOCK}hnorm.weight", "mtp.pre_fc_norm_hidden.weight", (D,)),
        once(f"{_BLOCK}eh_proj.weight", "mtp.fc.weight", (D, 2 * D), COLUMN),
        once(f"{_BLOCK}final_layernorm.weight", "mtp.norm.weight", (D,)),
    ),
    "mtp.layers.{m}.",
    most=1,
    copies=False,
)
"""Qwen3-Next and its successors have one, apart. It joins the embedding and the hidden state in Megatron's order.

Source: `Qwen3NextMultiTokenPredictor` of vLLM.
"""


def inner_layer(config: ModelConfig) -> LayerConfig:
    """The decoder layer in such a layer: like the last one of the model, and with attention in any case."""
    return replace(config.layers[-1], delta=None)


def rows_of(rows: Iterable[Row], config: ModelConfig, count: int, archive: Archive = NUMBERED) -> Iterator[Row]:
    """The rows of `count` layers of multi-token prediction, with their numbers in them.

    Args:
        rows: The rows of the family.
        config: The model.
        count: Number of layers.
        archive: How the family's archives hold them.
    """
    layer = inner_layer(config)
    own = [row for row in rows if row.megatron.startswith(MEGATRON_LAYER) and row.when(config, layer)]
    for number in range(count):
        block = _BLOCK.format(m=number)
        for row in (*archive.rows, *own):
            name = row.megatron.replace(_BLOCK, block).replace(MEGATRON_LAYER, block + _INNER)
            hf = {archive.hf_name(name, number, config): shape for name, shape in row.hf.items()}
            yield replace(row, megatron=name, hf=hf, when=always)


def every_row(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of such a layer in any model of a family, with Megatron's names alone, for names without numbers."""
    for row in (*NUMBERED.rows, *(row for row in rows if row.megatron.startswith(MEGATRON_LAYER))):
        block = _BLOCK.format(m=0)
        yield replace(row, megatron=row.megatron.replace(_BLOCK, block).replace(MEGATRON_LAYER, block + _INNER), hf={})


def copies_of(config: ModelConfig, archive: Archive = NUMBERED) -> Iterator[Replica]:
    """The copies of the embedding and of the head that files may hold in these layers."""
    for number in range(config.num_layers, config.num_layers + config.mtp_layers if archive.copies else 0):
        layer = HF_LAYER.format(i=number)
        yield Replica(f"{layer}embed_tokens.weight", of="model.embed_tokens.weight", when=lambda config: True)
        yield Replica(f"{layer}shared_head.head.weight", of="lm_head.weight", when=lambda config: True)


def count_in_hf(names: Iterable[str], num_layers: int) -> int:
    """The number of layers of multi-token prediction with tensors of these Hugging Face names."""
    numbered, apart = set(), set()
    for name in names:
        if match := _HF.match(name):
            numbered.add(int(match[1]) - num_layers)
        elif match := _APART.match(name):
            apart.add(int(match[1] or 0))
    return max((number + 1 for number in (*numbered, *apart) if 0 <= number < MAX_LAYERS), default=0)


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
