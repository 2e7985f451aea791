"""Spellings: the names that different writers give to the same tensors, as data.

The tables use one canonical name for each tensor on either side. A `Spelling` translates canonical Megatron names to
those of another writer (`--spec` chooses one by its name). An `HfSpelling` does the same for Hugging Face names, and
for files that stack all experts in one tensor.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptkit.errors import InputError
from ckptkit.sharding.rules import Split
from ckptkit.tables.hybrid_names import hybrid_name
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.prediction import of_0_19
from ckptkit.tensors import Tensor, vstack

GROUPED, SEQUENTIAL = "grouped", "sequential"
# The layer, its adapter, or the layer inside of one that adapts it.
_EXPERT_LAYER = r"(linear_fc[12](?:\.(?:adapter\.(?:adapter_\w+\.)?linear_(?:in|out)|lora_[AB]\.\w+|base_layer))?)"
_GROUPED_NAME = re.compile(rf"\.experts\.{_EXPERT_LAYER}\.(weight|bias)(\d+)$")
_SEQUENTIAL_NAME = re.compile(rf"\.experts\.local_experts\.(\d+)\.{_EXPERT_LAYER}\.(weight|bias)$")
_NUMBER = re.compile(r"\.\d+(?=\.)|(?:(?<=\.weight)|(?<=\.bias))\d+$")


def template(name: str) -> str:
    """A Megatron tensor name without layer and expert numbers."""
    return _NUMBER.sub("", name)


@dataclass(frozen=True)
class Spelling:
    """Another way to write the canonical Megatron names.

    Attributes:
        name: `te` (canonical: the names of the Transformer Engine layer spec), `local`, or a writer's name.
        endings: (canonical ending, written ending) pairs.
        experts: `grouped` (canonical: `experts.linear_fc1.weight3`, as `TEGroupedMLP` writes) or `sequential`
            (`experts.local_experts.3.linear_fc1.weight`, as `SequentialMLP` does).
        prefix: Beginning of every name, e.g. `language_model.` inside a multimodal model.
        tied_head: Whether a stage that holds the embedding also stores a copy as its tied head.
        hybrid: Whether to write the names of HybridModel. Reading them is the job of `checkpoints/hybrid_model.py`.
        starts: (canonical start, written start) pairs.
        blocks: Whether a rank stores its queries, then its keys, then its values, instead of query group by query
            group.
        padded: Whether the vocabulary is padded before it is split.
        extra_states: Whether the modules of Transformer Engine have an `_extra_state` in its files.
        of_0_19: Whether layers of multi-token prediction have the names of the ranks of Megatron-Core 0.19.
        splits: (canonical ending, rule) pairs for tensors that this writer's ranks divide by another rule.
    """

    name: str
    endings: tuple[tuple[str, str], ...] = ()
    experts: str = GROUPED
    prefix: str = ""
    tied_head: bool = False
    hybrid: bool = False
    starts: tuple[tuple[str, str], ...] = ()
    blocks: bool = False
    padded: bool = True
    extra_states: bool = True
    of_0_19: bool = False
    splits: tuple[tuple[str, Split], ...] = ()

    def split_of(self, name: str) -> Split | None:
        """The rule for a tensor of this canonical name, where it is another than that of the tables."""
        return next((split for ending, split in self.splits if name.endswith(ending)), None)

    def written(self, name: str) -> str:
        """The canonical name -> the name in this spelling."""
        name = _swap_start(_swap(name, self.endings), self.starts)
        if self.of_0_19:
            name = of_0_19(name)
        if self.experts == SEQUENTIAL:
            name = _GROUPED_NAME.sub(r".experts.local_experts.\3.\1.\2", name)
        return self.prefix + (hybrid_name(name) if self.hybrid else name)

    def canonical(self, name: str) -> str:
        """The name in this spelling -> the canonical name.

        Two names are ambiguous. In `local`, the norm before a dense MLP has the name that all spellings give to the
        norm before experts, and the norm before a DeltaNet that of the norm before attention. This function assumes a
        dense layer and attention. Code that has the table of the model need not assume.
        """
        name = name.removeprefix(self.prefix)
        name = _SEQUENTIAL_NAME.sub(r".experts.\2.\3\1", name)
        name = _swap_start(name, tuple((written, canonical) for canonical, written in self.starts))
        return _swap(name, tuple((written, canonical) for canonical, written in self.endings))


TE = Spelling("te")
LOCAL = Spelling(
    "local",
    (
        (".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),
        (".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"),
    ),
    experts=SEQUENTIAL,
    extra_states=False,
)
VERL = Spelling(
    "verl",
    endings=(
        (".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),
        (".self_attention.linear_qkv.weight", ".self_attn.qkv_proj.weight"),
        (".self_attention.linear_qkv.bias", ".self_attn.qkv_proj.bias"),
        (".self_attention.linear_proj.weight", ".self_attn.o_proj.weight"),
        (".self_attention.linear_proj.bias", ".self_attn.o_proj.bias"),
        (".mlp.linear_fc1.layer_norm_weight", ".post_attention_layernorm.weight"),
        (".mlp.linear_fc1.weight", ".mlp.gate_up_proj.weight"),
        (".mlp.linear_fc1.bias", ".mlp.gate_up_proj.bias"),
        (".mlp.linear_fc2.weight", ".mlp.down_proj.weight"),
        (".mlp.linear_fc2.bias", ".mlp.down_proj.bias"),
    ),
    starts=(
        ("decoder.layers.", "model.layers."),
        ("embedding.word_embeddings.", "model.embed_tokens."),
        ("decoder.final_layernorm.", "model.norm."),
        ("output_layer.", "lm_head."),
    ),
    blocks=True,
    padded=False,
    extra_states=False,
)
"""verl's own parallel Llama and Qwen2, which do not use the modules of Megatron-Core.

Source: `verl/models/llama/megatron` and `verl/models/qwen2/megatron`, up to verl 0.5.
"""


def _swap(name: str, endings: Sequence[tuple[str, str]]) -> str:
    for old, new in endings:
        if name.endswith(old):
            return name[: -len(old)] + new
    return name


def _swap_start(name: str, starts: Sequence[tuple[str, str]]) -> str:
    for old, new in starts:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


class Form:
    """How the tensors of an expert make one: one after another, in their rows. Other forms are derived from this one.

    Attributes:
        columns: Whether the outputs of a layer are columns of that tensor, `[in, out]`, and not rows.
    """

    columns: bool = False

    def shape(self, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of that tensor, from those of its parts."""
        return (sum(part[0] for part in parts), *parts[0][1:])

    def split(self, whole: Tensor, parts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The parts of the tensor, from their shapes."""
        return self.rows_apart(whole, [part[0] for part in parts])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`.

        Raises:
            ValueError: The parts differ in dtype or in their other axes.
        """
        return self.rows_together(parts)

    def rows_apart(self, whole: Tensor, heights: Sequence[int]) -> list[Tensor]:
        """The rows of each part from all rows, one for each output of the layer: those of a factor, for example."""
        bounds = [sum(heights[:number]) for number in range(len(heights) + 1)]
        return [whole.rows(top, bottom) for top, bottom in itertools.pairwise(bounds)]

    def rows_together(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `rows_apart`.

        Raises:
            ValueError: The parts differ in dtype or in their other axes.
        """
        return vstack(parts)


ROWS = Form()


@dataclass(frozen=True)
class Stack:
    """One Hugging Face tensor `[experts, rows, columns]` that replaces the tensors of all experts of a layer.

    Attributes:
        fused: Its name, with `{i}`.
        parts: Canonical names, with `{i}` and `{e}`, of the tensors that make up an expert's.
        form: How they do so.
    """

    fused: str
    parts: tuple[str, ...]
    form: Form = ROWS


@dataclass(frozen=True)
class HfSpelling:
    """Another way to write the canonical Hugging Face names.

    Attributes:
        name: For the `spelling` of `Family.fuse`.
        renames: (canonical, written) pieces of names; with a leading dot anywhere in a name, else at its start.
        stacks: The tensors that hold all experts of a layer; without `{i}`, of one of multi-token prediction.
        predicted: Whether stacks with `{i}` are those of layers of multi-token prediction, too, numbered behind the
            model's own.
    """

    name: str
    renames: tuple[tuple[str, str], ...] = ()
    stacks: tuple[Stack, ...] = ()
    predicted: bool = True

    @property
    def canonical_as_is(self) -> bool:
        """Whether its names are the canonical names."""
        return not (self.renames or self.stacks)

    def written(self, name: str) -> str:
        """The canonical name of a tensor that is not stacked -> the name in this spelling."""
        return _replace(name, self.renames)

    def canonical(self, name: str) -> str:
        """The name of a tensor that is not stacked in this spelling -> the canonical name."""
        return _replace(name, tuple((written, canonical) for canonical, written in self.renames))

    def names(self, canonical: Sequence[str], config: ModelConfig) -> set[str]:
        """All names that a model with these canonical names has in this spelling."""
        stacked = self._stacked(config)
        gone = {part for _, experts in stacked.values() for parts in experts for part in parts}
        return stacked.keys() | {self.written(name) for name in canonical if name not in gone}

    def split(
        self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], config: ModelConfig
    ) -> dict[str, Tensor]:
        """Tensors under this spelling -> canonical names, one for each expert.

        Args:
            tensors: Everything in the files.
            shapes: Canonical name -> shape that the config asks for.
            config: The model.

        Raises:
            InputError: A stack is missing, or its shape contradicts the config.
        """
        stacked = self._stacked(config)
        if missing := sorted(stacked.keys() - tensors.keys()):
            names = f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
            raise InputError(f"{len(missing)} missing: {names}")
        result = {self.canonical(name): tensor for name, tensor in tensors.items() if name not in stacked}
        for name, (form, experts) in stacked.items():
            inside = [shapes[part] for part in experts[0]]
            shape = (len(experts), *form.shape(inside))
            if tensors[name].shape != shape:
                raise InputError(f"{name} is {list(tensors[name].shape)}, the config says {list(shape)}")
            for number, parts in enumerate(experts):
                expert = tensors[name].rows(number, number + 1).reshape(shape[1:])
                result.update(zip(parts, form.split(expert, inside), strict=True))
        return result

    def join(self, tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """Canonical names -> this spelling.

        Raises:
            InputError: The experts of a layer have different dtypes, so that no single tensor can hold them.
        """
        stacked = self._stacked(config)
        gone = {part for _, experts in stacked.values() for parts in experts for part in parts}
        result = {self.written(name): tensor for name, tensor in tensors.items() if name not in gone}
        for name, (form, experts) in stacked.items():
            try:
                rows = vstack([form.join([tensors[part] for part in parts]) for parts in experts])
            except ValueError as error:
                raise InputError(f"{name}: {error}", hint="--dtype casts all of them to one type") from None
            result[name] = rows.reshape((len(experts), rows.shape[0] // len(experts), *rows.shape[1:]))
        return result

    def _stacked(self, config: ModelConfig) -> dict[str, tuple[Form, list[list[str]]]]:
        """Fused name -> its form, and for each expert the canonical names of its parts."""
        layers: list[int | None] = [number for number, layer in enumerate(config.layers) if layer.moe]
        further = config.mtp_layers if config.layers[-1].moe else 0  # these layers are like the last one
        if self.predicted:
            layers += range(config.num_layers, config.num_layers + further)
        return {
            stack.fused.format(i=i): (
                stack.form,
                [[part.format(i=i, e=e) for part in stack.parts] for e in range(config.num_experts)],
            )
            for stack in self.stacks
            for i in (layers if "{i}" in stack.fused else [None] * min(further, 1))
        }


HUB = HfSpelling("hub")


def _replace(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name.startswith(old) or (old.startswith(".") and old in name):
            return name.replace(old, new, 1)
    return name
