"""What FSDP and torch.distributed.checkpoint leave of a Hugging Face model, saved by real ranks, becomes the model."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptkit import convert, open_checkpoint, verify
from ckptkit.errors import CkptkitError, InputError, UnsupportedError, UsageError
from ckptkit.formats.trainer_states.fsdp import open_fsdp
from ckptkit.inspection.differences import diff
from ckptkit.inspection.summary import inspect
from ckptkit.inspection.validation import validate
from ckptkit.io.reading import read_tensor
from tests.formats.rank_pool import RankProcesses
from tests.formats.trainer_states.fsdp_ranks import MODULE
from tests.models import LLAMAS, llama_config, randomise, save_llama, save_model

SHARDINGS = ["flat", "columns", "hybrid", "with tp", "fsdp1 mesh", "fsdp1 hybrid", "fsdp1 sharded"]
COPIED = {"hybrid", "with tp", "fsdp1 hybrid"}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    with RankProcesses(4, MODULE) as pool:
        yield pool


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def get(kind: str) -> Path:
        if (folder / kind).exists():
            return folder / kind
        if kind == "critic":
            import torch
            from transformers import LlamaForTokenClassification

            torch.manual_seed(1)
            model: Any = LlamaForTokenClassification(llama_config(num_labels=1))
            model.to(torch.bfloat16)
            randomise(model)
            model.save_pretrained(folder / kind)
            return folder / kind
        return (save_llama if kind in LLAMAS else save_model)(folder / kind, kind, dtype="bfloat16")

    return get


@pytest.fixture(scope="module")
def saved(ranks: RankProcesses, models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(sharding, how it is saved, world size, kind) -> the folder that the ranks wrote."""
    folder, known = tmp_path_factory.mktemp("saved"), dict[Any, Path]()

    def get(sharding: str, save: str = "verl", world_size: int = 4, kind: str = "gqa", **options: Any) -> Path:
        key = (sharding, save, world_size, kind, str(options))
        if key not in known:
            out = folder / str(len(known)) / "actor"
            job = {"hf": str(models(kind)), "out": str(out), "sharding": sharding, "save": save, **options}
            assert ranks.run(world_size, {**job, "world_size": world_size, "critic": kind == "critic"}) == ""
            known[key] = out
        return known[key]

    return get


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("world_size", [4, 3])
def test_shards_of_every_kind(saved: Any, models: Any, tmp_path: Path, sharding: str, world_size: int) -> None:
    """Neither 250 rows nor 96 divide over them evenly; a mesh with copies needs an even number of ranks."""
    if sharding in COPIED and world_size % 2:
        world_size = 2
    actor = saved(sharding, world_size=world_size)
    result = convert(actor, tmp_path / "back", to="hf", hf_reference=models("gqa"))
    assert weights(tmp_path / "back") == weights(models("gqa"))
    assert (result.coverage["replicas"] > 0) == (sharding in COPIED and (sharding, world_size) != ("with tp", 2))
    assert result.source["format"] == "fsdp"


@pytest.mark.parametrize("kind", ["tied", "critic", "qwen3_moe", "qwen2-tied", "gemma3"])
def test_models_of_every_kind(saved: Any, models: Any, tmp_path: Path, kind: str) -> None:
    """Names as they are in memory, a head of one row (nothing on the last ranks), and one that is stored twice."""
    actor = saved("flat", kind=kind)
    convert(actor, tmp_path / "back", to="hf", hf_reference=models(kind))
    assert weights(tmp_path / "back") == weights(models(kind))


def test_the_folder_of_verl_alone(saved: Any, models: Any, tmp_path: Path) -> None:
    """Config and tokenizer are found in it; the optimizer is counted and left out; a critic is no language model."""
    actor = saved("hybrid")
    checkpoint = open_checkpoint(actor)
    assert checkpoint.notes[0] == "joined from the shards of 4 ranks of FSDP"
    assert "config and tokenizer are those of huggingface" in checkpoint.notes
    optimizer = sum(file.stat().st_size for file in actor.glob("optim_*"))
    assert (checkpoint.optimizer.tensors, checkpoint.optimizer.nbytes) == (0, optimizer)
    assert f"the optimizer's state ({optimizer:,} bytes) is left out" in checkpoint.notes
    assert diff(models("gqa"), actor).same
    assert inspect(actor).parameters == open_checkpoint(models("gqa")).parameters
    assert verify(models("gqa"), actor, level="weights").passed
    convert(actor, tmp_path / "out", to="torch_dist")
    assert diff(models("gqa"), tmp_path / "out").same
    assert not any(
        "metadata" in str(path) or path.suffix == ".pt" for path in (tmp_path / "out" / "ckptkit").rglob("*")
    )


@pytest.mark.parametrize("sharding", ["flat", "columns", "hybrid"])
def test_the_same_as_verl_merges(saved: Any, sharding: str) -> None:
    """Its rule: the shards of the first `mesh.shape[-1]` ranks, one behind the other along `placement.dim`."""
    import torch

    actor = saved(sharding)
    files = sorted(actor.glob("model_*"))
    states = [torch.load(file, map_location="cpu", weights_only=False) for file in files]
    shards = 2 if sharding == "hybrid" else 4
    ours = open_fsdp(actor).tensors
    assert ours.keys() == states[0].keys()
    for name in ours:
        parts = [state[name] for state in states[:shards]]
        merged = torch.cat([part._local_tensor for part in parts], dim=parts[0].placements[-1].dim)
        assert read_tensor(ours[name]).tobytes() == merged.contiguous().view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize(
    ("sharding", "under"),
    [("flat", []), ("flat", ["state_dict", "model"])]
    + [(sharding, ["model"]) for sharding in ("flat", "columns", "hybrid", "with tp", "fsdp1 sharded", "none")],
    ids=str,
)
def test_distributed_checkpoints(saved: Any, models: Any, tmp_path: Path, sharding: str, under: list[str]) -> None:
    """`model.` is the trainer's prefix as well as that of the model's own names."""
    folder = saved(sharding, "dcp", world_size=1 if sharding == "none" else 4, under=under)
    convert(folder, tmp_path / "back", to="hf", hf_reference=models("gqa"))
    assert weights(tmp_path / "back") == weights(models("gqa"))


def test_a_tied_model_without_its_head(saved: Any, models: Any, tmp_path: Path) -> None:
    """All of its names start with `model.`, which is the model's own."""
    folder = saved("flat", "dcp", kind="tied", under=["model"])
    convert(folder, tmp_path / "back", to="hf", hf_reference=models("tied"))
    assert weights(tmp_path / "back") == weights(models("tied"))


def test_an_optimizer_beside_the_model(saved: Any, models: Any, tmp_path: Path) -> None:
    folder = saved("flat", "dcp", under=["model"], optimizer=True)
    result = convert(folder, tmp_path / "back", to="hf", hf_reference=models("gqa"))
    assert weights(tmp_path / "back") == weights(models("gqa"))
    optimizer = inspect(folder, hf_reference=models("gqa")).optimizer
    assert optimizer["tensors"] == 3 * 39, "two moments and a step for each parameter"
    assert any("the optimizer's state (117 tensors, " in note for note in result.notes)


@pytest.mark.parametrize("where", ["", "huggingface", "../huggingface"])
def test_config_beside_the_distributed_checkpoint(saved: Any, models: Any, tmp_path: Path, where: str) -> None:
    folder = tmp_path / "run" / "step"
    shutil.copytree(saved("flat", "dcp", under=["model"]), folder)
    with pytest.raises(UsageError, match="does not say which model it is; give --hf-reference"):
        open_checkpoint(folder)
    (folder / where).mkdir(exist_ok=True)
    shutil.copy(models("gqa") / "config.json", folder / where / "config.json")
    convert(folder, tmp_path / "back", to="hf")
    assert diff(models("gqa"), tmp_path / "back").same
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == ["config.json", "model.safetensors"]


def test_validation_of_its_files(saved: Any, models: Any, tmp_path: Path) -> None:
    for sharding, save in (("hybrid", "verl"), ("flat", "dcp")):
        folder = Path(shutil.copytree(saved(sharding, save, under=[]), tmp_path / save))
        shutil.copy(models("gqa") / "config.json", folder / "config.json")
        validation = validate(folder, values=True)
        assert (validation.passed, validation.not_asked) == (True, [])
        assert not next(check for check in validation.checks if check.name == "checksums").summary.startswith("0 ")
        weights = next(iter(sorted(folder.glob("model_*_rank_1.pt")) or sorted(folder.glob("__1_*.distcp"))))
        damaged = bytearray(weights.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        weights.write_bytes(damaged)
        assert not validate(folder).passed, "a byte of a weight or of its pickle is another"


def test_one_rank_with_plain_tensors(models: Any, tmp_path: Path) -> None:
    """What FSDP1 leaves where there is nothing to shard, behind the names of its wrappers; and what LoRA leaves."""
    import torch
    from safetensors.torch import load_file

    (tmp_path / "actor").mkdir()
    file, state = tmp_path / "actor" / "model_world_size_1_rank_0.pt", load_file(models("gqa") / "model.safetensors")
    wrapped = {
        f"_fsdp_wrapped_module.{name}".replace("layers.1.", "layers.1._orig_mod."): state[name] for name in state
    }
    torch.save(wrapped, file)
    convert(tmp_path / "actor", tmp_path / "back", to="hf", hf_reference=models("gqa"))
    assert weights(tmp_path / "back") == weights(models("gqa"))
    torch.save({**state, "_orig_mod.model.norm.weight": state["model.norm.weight"]}, file)
    with pytest.raises(InputError, match=r"model\.norm\.weight is stored twice \(once as _orig_mod\.model\.norm"):
        open_checkpoint(tmp_path / "actor", hf_reference=models("gqa"))
    torch.save({**state, "model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 96)}, file)
    with pytest.raises(
        UnsupportedError, match=r"LoRA adapters beside the weights \(model\.layers\.0.*`ckptkit adapter merge`"
    ):
        open_checkpoint(tmp_path / "actor", hf_reference=models("gqa"))
    torch.save({**state, "model.other": torch.ones(2)}, file)
    with pytest.raises(InputError, match=r"1 unknown to this family: model\.other"):
        open_checkpoint(tmp_path / "actor", hf_reference=models("gqa"))


def test_weights_of_another_type_than_the_config_says(saved: Any, models: Any, tmp_path: Path) -> None:
    """Trainers keep fp32 masters; verl rounds them when it merges, here that is asked for."""
    actor = Path(shutil.copytree(saved("flat"), tmp_path / "actor"))
    config = actor / "huggingface" / "config.json"
    config.write_text(config.read_text().replace('"bfloat16"', '"float32"'))
    note = "the weights are bfloat16, config.json says float32 (--dtype float32 converts them)"
    assert note in open_checkpoint(actor).notes
    assert not any("config.json says" in text for text in open_checkpoint(saved("flat")).notes)


def test_what_only_the_reference_holds_comes_from_there(saved: Any, models: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    shutil.copytree(models("gqa"), tmp_path / "hf")
    state = load_file(models("gqa") / "model.safetensors")
    save_file({**state, name: torch.ones(4)}, tmp_path / "hf" / "model.safetensors")
    note = f"1 of the tensors come from the reference, not the checkpoint: {name}"
    convert(saved("flat"), tmp_path / "out", to="hf", hf_reference=tmp_path / "hf")
    assert load_file(tmp_path / "out" / "model.safetensors")[name].tolist() == [1.0] * 4
    assert note in open_checkpoint(saved("flat"), hf_reference=tmp_path / "hf").notes
    assert note not in open_checkpoint(saved("flat"), hf_reference=models("gqa")).notes


def test_a_megatron_checkpoint_is_not_taken_for_one(models: Any, tmp_path: Path) -> None:
    convert(models("gqa"), tmp_path / "out", to="torch_dist")
    assert open_checkpoint(tmp_path / "out").format == "torch_dist"
    (tmp_path / "out" / "release" / "metadata.json").unlink()
    with pytest.raises(CkptkitError):
        open_checkpoint(tmp_path / "out" / "release")


class TestDamaged:
    @pytest.fixture
    def actor(self, saved: Any, tmp_path: Path) -> Path:
        return Path(shutil.copytree(saved("hybrid"), tmp_path / "actor"))

    def refused(self, actor: Path, tmp_path: Path, match: str, kind: type[CkptkitError] = InputError) -> None:
        with pytest.raises(kind, match=match) as caught:
            convert(actor, tmp_path / "back", to="hf")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "back").exists()

    def test_a_missing_rank(self, actor: Path, tmp_path: Path) -> None:
        (actor / "model_world_size_4_rank_2.pt").unlink()
        self.refused(actor, tmp_path, r"model_world_size_4_rank_2\.pt missing; fetch the shards of all ranks")
        (actor / "model_world_size_4_rank_0.pt").unlink()
        self.refused(actor, tmp_path, r"model_world_size_4_rank_0\.pt and 1 more missing")

    def test_another_world_size(self, actor: Path, tmp_path: Path) -> None:
        (actor / "fsdp_config.json").write_text('{"world_size": 8}')
        self.refused(actor, tmp_path, "states world size 8, but the shards come from 4 ranks")
        (actor / "fsdp_config.json").unlink()
        shutil.copy(actor / "model_world_size_4_rank_0.pt", actor / "model_world_size_4_rank_4.pt")
        self.refused(actor, tmp_path, r"model_world_size_4_rank_4\.pt belongs to no rank of 4")
        (actor / "model_world_size_4_rank_4.pt").rename(actor / "model_world_size_2_rank_0.pt")
        self.refused(actor, tmp_path, "shards of world sizes 2 and 4")

    def test_a_rank_twice(self, actor: Path, tmp_path: Path) -> None:
        for rank in (1, 3):
            shutil.copy(actor / "model_world_size_4_rank_0.pt", actor / f"model_world_size_4_rank_{rank}.pt")
        self.refused(actor, tmp_path, r"tensor .*: (no rank holds its part 1 of 2|its parts make up)")

    def test_copies_that_differ(self, actor: Path, tmp_path: Path) -> None:
        part = next(iter(open_fsdp(actor).comparisons)).right
        piece: Any = part.bands[0].pieces[0]
        with open(piece.file, "r+b") as file:
            file.seek(piece.offset)
            byte = file.read(1)[0]
            file.seek(piece.offset)
            file.write(bytes([byte ^ 1]))
        self.refused(actor, tmp_path, "on ranks 0 and 2")

    def test_a_tensor_that_one_rank_lacks(self, actor: Path, tmp_path: Path) -> None:
        import torch

        file = actor / "model_world_size_4_rank_1.pt"
        state = torch.load(file, weights_only=False)
        del state["model.norm.weight"]
        torch.save(state, file)
        self.refused(actor, tmp_path, r"model\.norm\.weight is on one of the ranks 0 and 1 only")

    def test_code_in_the_pickle(self, actor: Path, tmp_path: Path) -> None:
        import os

        import torch

        class Code:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "it ran"),)

        torch.save({"model.norm.weight": Code()}, actor / "model_world_size_4_rank_1.pt")
        self.refused(actor, tmp_path, "names posix.mkdir, which is not on the list of things a checkpoint needs")
        assert not (tmp_path / "it ran").exists()
        pickle.loads(pickle.dumps(Code()))
        assert (tmp_path / "it ran").exists(), "the case would not have shown a run"

    def test_cut_short(self, actor: Path, tmp_path: Path) -> None:
        file = actor / "model_world_size_4_rank_3.pt"
        file.write_bytes(file.read_bytes()[:-1000])
        self.refused(actor, tmp_path, "model_world_size_4_rank_3")

    def test_a_hole_in_a_distributed_checkpoint(self, saved: Any, models: Any, tmp_path: Path) -> None:
        folder = shutil.copytree(saved("flat", "dcp", under=["model"]), tmp_path / "dcp")
        next(folder.glob("__2_*")).unlink()
        with pytest.raises(InputError, match="which is missing; fetch the missing file"):
            convert(folder, tmp_path / "back", to="hf", hf_reference=models("gqa"))
        assert not (tmp_path / "back").exists()

    def test_another_model(self, saved: Any, models: Any, tmp_path: Path) -> None:
        folder = saved("flat", "dcp", under=["model"])
        with pytest.raises(InputError, match=r"tensors and config disagree: .* of the wrong shape"):
            convert(folder, tmp_path / "back", to="hf", hf_reference=models("mqa"))
        with pytest.raises(InputError, match="missing"):
            convert(folder, tmp_path / "back", to="hf", hf_reference=models("biased"))

    def test_no_reference(self, actor: Path, tmp_path: Path) -> None:
        shutil.rmtree(actor / "huggingface")
        self.refused(actor, tmp_path, "does not say which model it is", UsageError)


def test_a_sum_that_was_not_made_is_refused(saved: Any, tmp_path: Path) -> None:
    """`Partial`: each rank has a summand, and nobody the weight."""
    import torch
    from torch.distributed.tensor.placement_types import Partial

    actor = Path(shutil.copytree(saved("flat"), tmp_path / "actor"))
    for file in actor.glob("model_*"):
        state = torch.load(file, weights_only=False)
        weight = state["model.norm.weight"]
        weight._spec.placements = (Partial(),)
        torch.save(state, file)
    with pytest.raises(UnsupportedError, match=r"weight: a tensor placed as Partial"):
        open_checkpoint(actor)
