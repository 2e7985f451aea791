"""Joining the shards of a Megatron checkpoint into the canonical view."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptkit.checkpoints.checkpoint import EMBEDDING, HEAD, is_on
from ckptkit.checkpoints.problems import UNTIED_HEAD, Problems
from ckptkit.errors import InputError, UsageError
from ckptkit.formats.torch_legacy import RankFile, RankKey
from ckptkit.io.plan import Comparison
from ckptkit.sharding.grid import Parallelism, Rank
from ckptkit.sharding.rules import expert_home
from ckptkit.sharding.stages import Stage, split_layers, stage_of_layer
from ckptkit.tables.family import Family
from ckptkit.tables.items import Item
from ckptkit.tables.model_config import ModelConfig
from ckptkit.tables.spelling import Spelling
from ckptkit.tensors import Tensor, vstack


@dataclass(frozen=True)
class Shards:
    """The files of a checkpoint's ranks, and facts about the model in them.

    Attributes:
        path: Where they are, for messages.
        family: The model's family.
        config: The model.
        items: Canonical name -> table item.
        spelling: How names are written.
        grid: The grid that they make up.
        ranks: (pp_rank, tp_rank, ep_rank) -> chunk -> written name -> tensor.
        most_rows: Rows that the vocabulary has at most with padding, or None if the user says what is padding.
        padding_to: Rows that padding explains.
    """

    path: Path
    family: Family
    config: ModelConfig
    items: Mapping[str, Item]
    spelling: Spelling
    grid: Parallelism
    ranks: Mapping[RankKey, RankFile]
    most_rows: int | None
    padding_to: int


@dataclass(frozen=True)
class Joined:
    """The whole tensors of a model.

    Attributes:
        tensors: Canonical name -> tensor without vocabulary padding.
        towers: Hugging Face name -> tensor, for tensors stored beside the text model.
        padded_vocab_size: Rows of the stored embedding.
        padding: Canonical name -> the rows of vocabulary padding below a tensor, where there are any.
        comparisons: Copies that must be equal, because only one of them is used.
        coverage: How many stored tensors were used, and how many are replicas.
        notes: Notes for the user.
    """

    tensors: dict[str, Tensor]
    towers: dict[str, Tensor]
    padded_vocab_size: int
    padding: dict[str, Tensor]
    comparisons: tuple[Comparison, ...]
    coverage: dict[str, int]
    notes: tuple[str, ...]


def join_shards(shards: Shards) -> Joined:
    """The canonical view of sharded tensors: each item's shards are found where it lives and joined by its rule.

    Raises:
        InputError: Shards are missing, unknown or mis-shaped, or do not fit the grid; or more rows of the vocabulary
            would be cut off than padding explains.
    """
    try:
        return _Joiner(shards).join()
    except UsageError as error:
        raise InputError(f"the stored grid does not fit the model: {error.what}", where=shards.path) from None


class _Joiner:
    """One joining: the tensors taken from the shards so far, and the results so far."""

    def __init__(self, shards: Shards) -> None:
        self.given = shards
        self.left = {
            (*rank, vp_stage): dict(chunk)
            for rank, chunks in shards.ranks.items()
            for vp_stage, chunk in enumerate(chunks.values())
        }
        self.stored = sum(len(chunk) for chunk in self.left.values())
        self.problems = Problems(shards.path)
        self.stages = split_layers(shards.config.num_layers, shards.grid)
        self.home = stage_of_layer(self.stages)
        self.tensors: dict[str, Tensor] = {}
        self.comparisons: list[Comparison] = []
        self.padded_vocab_size = 0
        self.padding: dict[str, Tensor] = {}
        self.bare: list[str] = []

    def join(self) -> Joined:
        used = 0
        for key, item in self.given.items.items():
            if (shards := self._shards(item)) is None:
                continue
            used += len(shards)
            self._add(key, item, shards)
        self._compare_tied_head()
        self._compare_embedding_of_prediction()
        towers = self._take_towers()
        used += len(towers)
        self.problems.unknown({name for chunk in self.left.values() for name in chunk})
        self.problems.check()
        notes = [f"{len(self.bare)} tensors have no slots for values that are their keys"] if self.bare else []
        return Joined(
            self.tensors,
            towers,
            self.padded_vocab_size,
            self.padding,
            tuple(self.comparisons),
            {"used": used, "replicas": self.stored - used},
            tuple(notes),
        )

    def _stage(self, item: Item) -> tuple[Stage, int | None]:
        if item.layer is not None:
            return self.home[item.layer]
        return next((stage, None) for stage in self.stages if is_on(item, stage, self.given.grid))

    def _shards(self, item: Item) -> list[Tensor] | None:
        """The distinct shards of an item in order, or None if one is missing; further copies must be equal."""
        stage, number = self._stage(item)
        split = item.split(self.given.spelling)
        ep, expert = None, None
        if item.expert is not None:
            ep, expert = expert_home(item.expert, self.given.config.num_experts, self.given.grid.ep)
        where = "" if item.layer is None else f" (layer {item.layer})"
        found: dict[int, list[tuple[Rank, Tensor]]] = defaultdict(list)
        for rank in self.given.grid.ranks():
            if rank.pp != stage.pp_rank or ep not in (None, rank.ep):
                continue
            name = self.given.spelling.written(item.name(number, expert))
            shard = self.problems.take(self.left[rank.pp, rank.tp, rank.ep, stage.vp_stage], name, None, where)
            if shard is None:
                return None
            found[0 if split.replicated else rank.etp if split.expert else rank.tp].append((rank, shard))
        for copies in found.values():
            first, original = copies[0]
            for other, copy in copies[1:]:
                what = f"{item.key} on {_two_ranks(first, other)}"
                self.comparisons.append(Comparison(original, copy, what))
        return [found[number][0][1] for number in sorted(found)]

    def _add(self, key: str, item: Item, shards: list[Tensor]) -> None:
        split = item.split(self.given.spelling)
        try:
            joined = split.join(shards)
            copies = [Comparison(*pair, f"{key} on ranks that share heads") for pair in split.copies(shards)]
        except (ValueError, UsageError) as error:
            self.problems.wrong.append(f"{key}: its shards do not fit together ({error})")
            return
        if split.padded:
            self.padded_vocab_size = joined.shape[0]
            self._check_padding(key, joined.shape[0], item.shape[0])
            joined = self._without_padding(key, joined, item.shape[0])
        if joined.shape == item.bare_shape != item.shape:
            joined = item.completed(joined)
            self.bare.append(key)
        if joined.shape != item.shape:
            self.problems.wrong.append(f"{key} is {list(joined.shape)}, the config says {list(item.shape)}")
            return
        self.tensors[key] = joined
        self.comparisons += copies

    def _check_padding(self, key: str, rows: int, size: int) -> None:
        """Rows beyond the vocabulary are cut off, which may only be padding."""
        most = self.given.most_rows
        if most is not None and rows > most:
            raise InputError(
                f"{key} has {rows} rows, a vocabulary of {size} has at most {most} with its padding: weights would be"
                " lost",
                where=self.given.path,
                hint=f"give --hf-reference with the right vocab_size, or --vocab-size {size} if they are padding",
            )

    def _without_padding(self, key: str, tensor: Tensor, size: int) -> Tensor:
        """The rows of the vocabulary; what is below them is kept aside, unless the user says that it is no padding."""
        rows = tensor.shape[0]
        if rows <= size:
            return tensor
        if rows <= self.given.padding_to:
            self.padding[key] = tensor.rows(size, rows)
        return tensor.rows(0, size)

    def _take_towers(self) -> dict[str, Tensor]:
        """Takes the tensors that are stored beside the text model."""
        towers = self.given.family.towers
        found: dict[str, Tensor] = {}
        for _, chunk in sorted(self.left.items()):
            for name in sorted(chunk):
                prefix = next((prefix for prefix in towers if name.startswith(prefix)), None)
                if prefix is None:
                    continue
                tensor, hf = chunk.pop(name), towers[prefix] + name.removeprefix(prefix)
                if found.setdefault(hf, tensor) is not tensor:
                    self.comparisons.append(Comparison(found[hf], tensor, f"{name} on ranks that share it"))
        return found

    def _compare_tied_head(self) -> None:
        """A tied model at PP > 1 stores the embedding again on the last stage; Megatron trains the two as one."""
        if self.given.config.tied and EMBEDDING in self.tensors:
            name = self.given.spelling.written(HEAD)
            what = "output_layer.weight of the last stage and the tied embedding"
            self._compare_copy(name, what, "the tied copy on the last stage", UNTIED_HEAD)

    def _compare_embedding_of_prediction(self) -> None:
        """At PP > 1 the last stage has the embedding for its layers of multi-token prediction, which embed tokens."""
        last = next(stage for stage in self.stages if stage.last)
        if self.given.config.mtp_layers and EMBEDDING in self.tensors and not last.first:
            name = self.given.spelling.written(EMBEDDING)
            what = "the embedding of the last stage, for multi-token prediction, and that of the first"
            self._compare_copy(name, what, "the copy for multi-token prediction on the last stage")

    def _compare_copy(self, name: str, what: str, which: str, hint: str | None = None) -> None:
        """Takes a copy of the embedding from the last stage, and compares it with the embedding."""
        last = next(stage for stage in self.stages if stage.last)
        shards: dict[int, Tensor] = {}
        missing = False
        for rank in self.given.grid.ranks():
            if rank.pp == last.pp_rank:
                shard = self.left[rank.pp, rank.tp, rank.ep, last.vp_stage].pop(name, None)
                missing = missing or shard is None
                if shard is not None and shards.setdefault(rank.tp, shard) is not shard:
                    self.comparisons.append(Comparison(shards[rank.tp], shard, f"{name} on ranks that share it"))
        if not missing:
            copy = vstack([shards[tp_rank] for tp_rank in sorted(shards)])
            rows = min(copy.shape[0], self.given.config.vocab_size)
            self.comparisons.append(Comparison(copy.rows(0, rows), self.tensors[EMBEDDING], what, hint))
        elif shards or not last.first:
            self.problems.missing.append(f"{name} ({which})")


def _two_ranks(first: Rank, other: Rank) -> str:
    if first.ep == other.ep:
        return f"tensor parallel ranks {first.tp} and {other.tp}"
    return f"expert parallel ranks {first.ep} and {other.ep} (tensor parallel ranks {first.tp} and {other.tp})"
