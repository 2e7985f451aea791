"""An opened checkpoint: whatever its format, the same canonical view, and any rank's shard of it.

Opening reads headers only. The view is one `Tensor` recipe for each item of the family's table, under Megatron's
canonical name with the global layer number and without vocabulary padding. Hugging Face tensors are packed into it,
shards are joined into it; both are slicing, so nothing is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptkit.dtypes import DTYPES_BY_TORCH_NAME, TORCH_DTYPE_NAMES, DType
from ckptkit.errors import UsageError
from ckptkit.formats.sidecar import Sidecar
from ckptkit.formats.torch_legacy import OptimizerState, Shards
from ckptkit.io.castable import CASTABLE
from ckptkit.io.plan import Comparison, Dropped
from ckptkit.io.source import Seen
from ckptkit.sharding.grid import Parallelism, Rank
from ckptkit.sharding.rules import Shard, Split, expert_home, pad_rows, padded_vocab_size
from ckptkit.sharding.stages import Stage, holds_cut, split_layers
from ckptkit.tables.divisibility import check_divides
from ckptkit.tables.family import Family
from ckptkit.tables.items import Item
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.prediction import is_prediction
from ckptkit.tables.spelling import HfSpelling, Spelling
from ckptkit.tensors import Tensor, vstack

if TYPE_CHECKING:
    import torch

    from ckptkit.checkpoints.lora.record import Lora

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
DEFAULT_DIVISIBLE_BY = 128


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint of any format. It is frozen; a change makes a copy (`replace`).

    Attributes:
        path: Where it is.
        format: `hf`, `packed`, `torch`, `torch_dist`, `dcp`, `fsdp` or `peft`.
        family: The family whose table it follows.
        config: The model; for Megatron formats stored `args` override the sidecar's config.json.
        sidecar: The Hugging Face side: config.json and small files, headers, tensors without a Megatron slot.
        items: Canonical name -> table item, in table order.
        tensors: Canonical name -> tensor without vocabulary padding.
        grid: The stored grid; 1 x 1 where nothing is sharded.
        spelling: How its Megatron names are spelled; the canonical spelling for Hugging Face.
        padded_vocab_size: Rows of the stored embedding.
        padding: Canonical name -> the rows of vocabulary padding that are stored below its tensor.
        args: Megatron's `args`, empty for Hugging Face.
        comparisons: Copies that must be equal, because only one of them is used (replicated shards, tied copies).
        coverage: Number of stored tensors that are used, are replicas, go into the sidecar, ...
        notes: Notes for the user.
        disagreements: Fields in which `args` contradict config.json, as sentences.
        optimizer: The optimizer's state beside the model, which is left out.
        seen: Fingerprints of its files from before they were read.
        lora: The facts about an adapter, whose factors the tensors are; None for a model.
    """

    path: Path
    format: str
    family: Family
    config: ModelConfig
    sidecar: Sidecar
    items: dict[str, Item]
    tensors: dict[str, Tensor]
    spelling: Spelling
    grid: Parallelism = field(default_factory=Parallelism)
    padded_vocab_size: int = 0
    padding: Mapping[str, Tensor] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    coverage: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    disagreements: tuple[str, ...] = ()
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    seen: Seen = field(default_factory=Seen)
    lora: Lora | None = None

    def noting(self, *notes: str) -> Checkpoint:
        """The same checkpoint with further notes."""
        return replace(self, notes=(*self.notes, *notes))

    @property
    def parameters(self) -> int:
        """Number of parameters, each counted once; tensors in the sidecar do not count."""
        return sum(item.parameters for item in self.items.values())

    def without_prediction(self) -> Checkpoint:
        """The same model without its layers of multi-token prediction, which no logits depend on."""
        items = {key: item for key, item in self.items.items() if not is_prediction(key)}
        return replace(
            self,
            config=replace(self.config, mtp_layers=0),
            items=items,
            tensors={key: tensor for key, tensor in self.tensors.items() if key in items},
        )

    @property
    def main_dtype(self) -> str:
        """The element type that most bytes have, as torch names it."""
        return TORCH_DTYPE_NAMES[most_common_dtype(self.tensors.values())]

    @property
    def stored_names(self) -> set[str]:
        """Names of the tensors in the original Hugging Face model; empty if they are not known."""
        return {name for header in self.sidecar.headers.values() for name in header.entries}

    @property
    def towers_are_missing(self) -> bool:
        """Whether this is a multimodal model of which the checkpoint holds the text part only."""
        if (
            self.family.text_only is None or self.format == "hf" or self.lora is not None
        ):  # a Hugging Face directory counts as complete
            return False
        towers = {name for name in self.stored_names if self.family.is_extra(name, self.config)}
        return bool(towers - self.sidecar.extras.keys()) if self.stored_names else not self.sidecar.extras

    def hf_tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        """Everything that the Hugging Face model holds.

        Args:
            names: Names of the tensors in the original model, to get the same spelling; empty for canonical names.
        """
        family, config = self.family, self.config
        spelling = self._hf_spelling(names)
        tensors: dict[str, Tensor] = {}
        for key, item in self.items.items():
            tensors.update(item.unpack(self.tensors[key]))
            for slot, found, _ in item.dropped(self.tensors[key]):
                if slot.hf is not None and spelling.written(slot.hf) in names:
                    tensors[slot.hf] = found
        tensors.update(self.sidecar.extras)
        if self.lora is not None:
            return tensors
        tensors.update(family.missing_buffers(tensors, config, DTYPES_BY_TORCH_NAME[self.main_dtype]))
        for replica in family.copies(config):
            if spelling.written(replica.hf) in names and replica.of in tensors:
                tensors[replica.hf] = tensors[replica.of]
        return family.fuse(tensors, config, spelling.name)

    def _hf_spelling(self, names: Collection[str]) -> HfSpelling:
        family = self.family
        return family.hf_spelling(names, self.config, self.items.values()) if names else family.hf_spellings[0]

    def dropped(self, names: Collection[str]) -> list[Dropped]:
        """Stored parts that `hf_tensors` drops, because the model does not use them.

        Parts that were filled in by opening this checkpoint do not count.

        Args:
            names: As for `hf_tensors`.
        """
        spelling = self._hf_spelling(names)
        return [
            Dropped(slot.slot.name, key, found, expected)
            for key, item in self.items.items()
            for slot, found, expected in item.dropped(self.tensors[key])
            if (slot.hf is None or spelling.written(slot.hf) not in names) and not found.same_bytes_as(expected)
        ]

    def chunk(
        self, stage: Stage, rank: Rank, grid: Parallelism, spelling: Spelling, divisible_by: int
    ) -> dict[str, Tensor]:
        """The tensors of one model chunk of one rank, under the rank's own layer and expert numbers.

        Args:
            stage: The chunk's stage.
            rank: The rank's places in the grid.
            grid: The grid.
            spelling: Spelling of the names.
            divisible_by: The vocabulary is padded to a multiple of this times the tensor parallel size.

        Raises:
            UsageError: A tensor does not divide over the ranks.
        """
        found = {}
        for key, name in self.names_on(stage, rank, grid, spelling):
            tensor, split = self.padded(key, grid.tp, divisible_by), self.items[key].split(spelling)
            found[name] = _cut(key, tensor, Shard(split, *_place(split, rank, grid)))
        return found

    def names_on(self, stage: Stage, rank: Rank, grid: Parallelism, spelling: Spelling) -> Iterator[tuple[str, str]]:
        """The tensors of one model chunk of one rank: canonical name, and name under the rank's own numbers.

        The copy of a tied embedding that serves as head comes with the canonical name of the embedding.

        Args:
            stage: The chunk's stage.
            rank: The rank's places in the grid.
            grid: The grid.
            spelling: Spelling of the rank's names.
        """
        return ((key, name) for name, key in self._held([stage], grid, spelling)[stage, rank.ep].items())

    def shards(
        self, stages: Sequence[Stage], grid: Parallelism, spelling: Spelling, divisible_by: int
    ) -> Iterator[tuple[Stage, Rank, Shards]]:
        """`chunk` of every stage for each of its ranks, without a tensor for each shard.

        Raises:
            UsageError: A tensor does not divide over the ranks.
        """
        splits = {key: item.split(spelling) for key, item in self.items.items()}
        cuts: dict[tuple[int, int, int], Shard] = {}
        forms: dict[tuple[object, ...], tuple[DType, tuple[int, ...]]] = {}
        for (stage, ep), keys in self._held(stages, grid, spelling).items():
            wholes = tuple(self.padded(key, grid.tp, divisible_by) for key in keys.values())
            for rank in grid.ranks():
                if (rank.pp, rank.ep) != (stage.pp_rank, ep):
                    continue
                shards = Shards(tuple(keys), wholes, [], [])
                for key, whole in zip(keys.values(), wholes, strict=True):
                    split = splits[key]
                    place = id(split), *_place(split, rank, grid)
                    cut = cuts.get(place) or cuts.setdefault(place, Shard(split, *place[1:]))
                    kind = place, whole.shape, whole.dtype.name, whole.out_dtype.name
                    if kind not in forms:
                        shard = _cut(key, whole, cut)
                        forms[kind] = shard.out_dtype, shard.shape
                    shards.cuts.append(cut)
                    shards.forms.append(forms[kind])
                yield stage, rank, shards

    def _held(
        self, stages: Iterable[Stage], grid: Parallelism, spelling: Spelling
    ) -> dict[tuple[Stage, int], dict[str, str]]:
        """For each stage and expert parallel rank: names under its own layer and expert numbers -> canonical names."""
        held: dict[tuple[Stage, int], dict[str, str]] = {(stage, ep): {} for stage in stages for ep in range(grid.ep)}
        written = lru_cache(maxsize=None)(lambda name, layer, expert: spelling.written(name.format(i=layer, e=expert)))
        for stage in stages:
            local = {layer: number for number, layer in enumerate(stage.layers)}
            for key, item in self.items.items():
                if not is_on(item, stage, grid):
                    continue
                homes, expert = range(grid.ep), None
                if item.expert is not None:
                    home, expert = expert_home(item.expert, self.config.num_experts, grid.ep)
                    homes = range(home, home + 1)
                name = written(item.row.megatron, None if item.layer is None else local[item.layer], expert)
                for ep in homes:
                    held[stage, ep][name] = key
            if self.config.tied and self.lora is None and stage.last and (spelling.tied_head or not stage.first):
                for ep in range(grid.ep):
                    held[stage, ep][spelling.written(HEAD)] = EMBEDDING
            if self.config.mtp_layers and self.lora is None and stage.last and not stage.first:
                for ep in range(grid.ep):  # multi-token prediction embeds tokens, too
                    held[stage, ep][spelling.written(EMBEDDING)] = EMBEDDING
        return held

    def padded(self, key: str, tp: int, divisible_by: int) -> Tensor:
        """The whole tensor of a canonical name, with vocabulary padding for `tp` ranks where it has a vocabulary.

        Stored padding stays as far as there is room; the rest is zeros.
        """
        tensor = self.tensors[key]
        if not self.items[key].row.split.padded:
            return tensor
        rows, stored = padded_vocab_size(tensor.shape[0], divisible_by, tp), self.padding.get(key)
        if stored is not None and rows > tensor.shape[0]:
            kept = stored.rows(0, min(stored.shape[0], rows - tensor.shape[0]))
            tensor = vstack([tensor, kept if tensor.cast is None else kept.astype(tensor.cast)])
        return pad_rows(tensor, rows)

    def padding_left_out(self, tp: int, divisible_by: int) -> list[Dropped]:
        """The rows of stored padding that `padded` has no room for, as parts that are zeros as a rule."""
        found = []
        for key, stored in self.padding.items():
            if key not in self.items or stored.dtype.name not in CASTABLE:
                continue
            size = self.tensors[key].shape[0]
            kept = padded_vocab_size(size, divisible_by, tp) - size
            if kept < stored.shape[0]:
                rest = stored.rows(kept, stored.shape[0])
                zeros = Tensor.full(rest.dtype, rest.shape)
                found.append(Dropped("rows of vocabulary padding", key, rest, zeros, usual=True))
        return found

    def shard(
        self,
        tp_rank: int = 0,
        tp: int = 1,
        pp_rank: int = 0,
        pp: int = 1,
        vp_stage: int = 0,
        vpp: int = 1,
        *,
        ep_rank: int = 0,
        ep: int = 1,
        grid: Parallelism | None = None,
        spec: str = "te",
        layout: str = "full",
        make_vocab_size_divisible_by: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """One rank's tensors, loaded, from any format and for any grid.

        Args:
            tp_rank: Tensor parallel rank, of `tp`.
            tp: Tensor parallel size.
            pp_rank: Pipeline rank, of `pp`.
            pp: Pipeline parallel size.
            vp_stage: Virtual stage (model chunk), of `vpp`.
            vpp: Virtual pipeline size.
            ep_rank: Expert parallel rank, of `ep`.
            ep: Expert parallel size.
            grid: The whole grid instead of the sizes, for uneven pipelines and another expert tensor parallel size.
            spec: Spelling of the names: `te`, `local`, or another that the family has.
            layout: `full`, or `text` for a multimodal model's text part under a text model's names.
            make_vocab_size_divisible_by: As Megatron-LM's option of that name; by default 128, or 1 for a spelling
                without padding.

        Returns:
            Megatron names with the rank's own layer and expert numbers -> CPU tensors in the stored dtype.

        Raises:
            UsageError: The grid cannot hold the model, or the rank is not in it.
        """
        from ckptkit.io.as_torch import load

        grid = grid or Parallelism(tp, pp, vpp, ep=ep)
        check_grid(self.config, grid)
        rank = next((r for r in grid.ranks() if (r.pp, r.tp, r.ep) == (pp_rank, tp_rank, ep_rank)), None)
        if rank is None or not 0 <= vp_stage < grid.vpp:
            raise UsageError(f"no rank tp {tp_rank}, pp {pp_rank}, ep {ep_rank}, virtual stage {vp_stage} in {grid}")
        stages = {(s.pp_rank, s.vp_stage): s for s in split_layers(self.config.num_layers, grid)}
        spelling = self.family.spelling(spec, text=layout == "text")
        divisible_by = vocabulary_multiple(self.config.vocab_size, grid.tp, spelling, make_vocab_size_divisible_by)
        chunk = self.chunk(stages[pp_rank, vp_stage], rank, grid, spelling, divisible_by)
        return {name: load(tensor) for name, tensor in chunk.items()}


def _place(split: Split, rank: Rank, grid: Parallelism) -> tuple[int, int]:
    """Number of a rank among those that a rule splits tensors over, and how many these are."""
    return (rank.etp, grid.expert_tp) if split.expert else (rank.tp, grid.tp)


def _cut(key: str, tensor: Tensor, cut: Shard) -> Tensor:
    try:
        return cut(tensor)
    except UsageError as error:
        raise UsageError(error.what, where=key, hint=error.hint) from None


def most_common_dtype(tensors: Iterable[Tensor]) -> DType:
    """The element type that most bytes of tensors have as written."""
    sizes: Counter[DType] = Counter()
    for tensor in tensors:
        sizes[tensor.cast or tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def is_on(item: Item, stage: Stage, grid: Parallelism) -> bool:
    """Whether a stage holds an item: layers by number, an adapter beside its layer, embedding first, the rest last."""
    if item.layer is not None:
        return item.layer in stage.layers
    if item.cut is not None:
        return holds_cut(stage, item.cut, grid)
    return stage.first if item.row.first else stage.last


def vocabulary_multiple(vocab_size: int, tp: int, spelling: Spelling, asked: int | None) -> int:
    """The vocabulary is padded to a multiple of this number times `tp`.

    Args:
        vocab_size: Size of the vocabulary.
        tp: Tensor parallel size.
        spelling: Spelling of the output.
        asked: The number that the user asks for, or None.

    Raises:
        UsageError: The number is not positive; or the spelling does not pad, and padding is asked for or needed.
    """
    if asked is not None and asked < 1:
        raise UsageError(f"--make-vocab-size-divisible-by must be at least 1, got {asked}")
    if spelling.padded:
        return asked or DEFAULT_DIVISIBLE_BY
    if asked not in (None, 1):
        hint = "drop --make-vocab-size-divisible-by"
        raise UsageError(f"--spec {spelling.name} does not pad the vocabulary", hint=hint)
    if vocab_size % tp:
        what = (
            f"a vocabulary of {vocab_size} does not divide over --tp {tp}, and --spec {spelling.name} does not pad it"
        )
        raise UsageError(what, hint="choose another --tp")
    return 1


def check_grid(config: ModelConfig, grid: Parallelism) -> None:
    """Checks that a model can be written for a grid.

    Raises:
        UsageError: Its sizes do not divide over the grid, or `--etp` is given for a model without experts.
    """
    if grid.etp is not None and not config.num_experts:
        raise UsageError("--etp needs a model with experts, and this one has none")
    check_divides(config, grid)
