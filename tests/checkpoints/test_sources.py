"""Checkpoints as they lie around: roots and iterations, verl's folders, no args, no vocabulary size, an optimizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptkit import Parallelism, convert
from ckptkit.checkpoints.opening import open_checkpoint
from ckptkit.errors import CkptkitError, InputError, UnsupportedError, UsageError
from ckptkit.inspection.differences import diff
from ckptkit.inspection.summary import inspect
from ckptkit.sharding.grid import StatedGrid
from tests.models import files_of, save_llama, save_model

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def converted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The model in a layout on a grid, converted once."""
    made: dict[str, Path] = {}

    def get(to: str, grid: Parallelism) -> Path:
        key = f"{to} {grid!r}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("meg") / "model"
            convert(llama, made[key], to=to, grid=grid)
        return made[key]

    return get


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    import torch

    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def trained(source: Path, path: Path, *, args: bool = True, **changes: object) -> Path:
    """What training leaves: ranks under `path`, no sidecar; without `args`, or with some of them changed."""
    shutil.copytree(source / "release", path)
    for file in (*path.glob("mp_rank_*/*.pt"), *path.glob("common.pt")):

        def change(content: dict[str, Any]) -> None:
            if not args:
                content.pop("args")
                return
            for key, value in changes.items():
                setattr(content["args"], key, value)

        edit(file, change)
    return path


class TestIterations:
    @pytest.fixture
    def root(self, converted: Callable[..., Path], tmp_path: Path) -> Path:
        """Two iterations; in the second, one norm is doubled."""
        source = converted("torch", Parallelism())
        for number in (5, 20):
            trained(source, tmp_path / f"iter_{number:07d}")
        edit(
            tmp_path / "iter_0000020" / "mp_rank_00" / "model_optim_rng.pt",
            lambda content: content["model"]["decoder.final_layernorm.weight"].mul_(2),
        )
        (tmp_path / TRACKER).write_text("20\n")
        return tmp_path

    def test_the_tracker_decides_unless_somebody_asks(self, llama: Path, root: Path) -> None:
        assert open_checkpoint(root).path.name == "iter_0000020"
        assert open_checkpoint(root, iteration=5).path.name == "iter_0000005"
        assert open_checkpoint(root / "iter_0000005").path.name == "iter_0000005"
        assert not diff(llama, root).same and diff(llama, root / "iter_0000005").same
        assert inspect(root, iteration=5).grid == "TP1 x PP1"

    def test_without_a_tracker(self, root: Path) -> None:
        (root / TRACKER).unlink()
        with pytest.raises(UsageError, match=r"several iterations \(iter_0000005, iter_0000020\).*--iteration"):
            open_checkpoint(root)
        assert open_checkpoint(root, iteration=20).path.name == "iter_0000020"
        shutil.rmtree(root / "iter_0000005")
        assert open_checkpoint(root).path.name == "iter_0000020"

    def test_an_iteration_that_is_not_there(self, llama: Path, root: Path) -> None:
        with pytest.raises(UsageError, match="no iteration 6 in it; iterations that are there: iter_0000005, iter_00"):
            open_checkpoint(root, iteration=6)
        with pytest.raises(UsageError, match="no iteration 5 in it; iterations that are there: none"):
            open_checkpoint(root / "iter_0000005", iteration=5)
        with pytest.raises(UsageError, match="--iteration is about the root of a Megatron checkpoint"):
            open_checkpoint(llama, iteration=5)

    def test_release(self, llama: Path, converted: Callable[..., Path]) -> None:
        root = converted("torch", Parallelism(2, 2))
        for path in (root, root / "release"):
            assert diff(llama, path).same, path


class TestPlaces:
    """One iteration, however it is called: the sidecar is beside it, and with it what comes back."""

    @pytest.mark.parametrize("to", ["torch", "torch_dist"])
    @pytest.mark.parametrize("called", [".", "..", "link", "link/"])
    def test_other_names(
        self,
        llama: Path,
        converted: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        to: str,
        called: str,
    ) -> None:
        iteration = converted(to, Parallelism(2, 2)) / "release"
        (tmp_path / "link").symlink_to(iteration)
        inside = next(item for item in iteration.iterdir() if item.is_dir()) if to == "torch" else iteration
        monkeypatch.chdir({".": iteration, "..": inside}.get(called, tmp_path))
        convert(called, tmp_path / "hf", to="hf")
        assert files_of(tmp_path / "hf") == files_of(llama)

    @pytest.mark.parametrize("to", ["torch", "torch_dist"])
    @pytest.mark.parametrize("where", [".", "release"])
    def test_a_config_beside_the_ranks(
        self, llama: Path, converted: Callable[..., Path], tmp_path: Path, to: str, where: str
    ) -> None:
        shutil.copytree(converted(to, Parallelism()), tmp_path / "meg")
        shutil.copy(llama / "config.json", tmp_path / "meg" / where)
        assert open_checkpoint(tmp_path / "meg").format == to
        assert open_checkpoint(tmp_path / "meg" / "release").format == to

    def test_a_reference_whose_weights_were_not_fetched(self, converted: Callable[..., Path], tmp_path: Path) -> None:
        source = save_llama(tmp_path / "hf", shard="300KB")
        shutil.copytree(source, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
        assert (tmp_path / "small/model.safetensors.index.json").is_file()
        path = trained(converted("torch", Parallelism(2)), tmp_path / "iter_0000001")
        convert(path, tmp_path / "out", to="hf", hf_reference=tmp_path / "small")
        assert (tmp_path / "out/config.json").read_bytes() == (source / "config.json").read_bytes()

    def test_the_reference_is_not_overwritten(
        self, llama: Path, converted: Callable[..., Path], tmp_path: Path
    ) -> None:
        reference = shutil.copytree(llama, tmp_path / "reference")
        path = trained(converted("torch", Parallelism(2)), tmp_path / "iter_0000001")
        with pytest.raises(UsageError, match="the destination holds the source"):
            convert(path, reference, to="hf", hf_reference=reference, overwrite=True, dtype="bfloat16")

    def test_a_loop_of_links(self, llama: Path, tmp_path: Path) -> None:
        source = shutil.copytree(llama, tmp_path / "hf")
        (source / "loop").symlink_to("loop")
        with pytest.raises(InputError, match="a symbolic link that leads nowhere"):
            open_checkpoint(source)

    @pytest.mark.parametrize(("stated", "fails"), [(None, False), ("fp8", True), ({"quant_method": "gptq"}, True)])
    def test_what_says_that_it_is_quantised(self, llama: Path, tmp_path: Path, stated: object, fails: bool) -> None:
        source = shutil.copytree(llama, tmp_path / "hf")
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
        if fails:
            with pytest.raises(UnsupportedError, match="quantised weights"):
                open_checkpoint(source)
        else:
            open_checkpoint(source)


class TestVerl:
    """Its folders, as `megatron_checkpoint_manager.py` of verl writes them: layout 1 (to 2025) and 2."""

    @pytest.fixture
    def actor(self, llama: Path, converted: Callable[..., Path], tmp_path: Path) -> Path:
        actor = tmp_path / "global_step_7" / "actor"
        trained(converted("torch_dist", Parallelism(2, 2)), actor / "dist_ckpt", args=False)
        (actor / "huggingface").mkdir()
        for name in ("config.json", "generation_config.json"):
            shutil.copy(llama / name, actor / "huggingface" / name)
        (actor / "transformer_config.json").write_text("{}")
        (tmp_path / TRACKER).write_text("7")
        return actor

    def test_layout_1(self, llama: Path, actor: Path, tmp_path: Path) -> None:
        for path in (actor, actor.parent, tmp_path):
            checkpoint = open_checkpoint(path)
            assert (checkpoint.format, checkpoint.path) == ("torch_dist", actor / "dist_ckpt")
            assert "config and tokenizer are those of huggingface" in checkpoint.notes
            assert diff(llama, path).same
        convert(actor, tmp_path / "back", to="hf")
        assert (tmp_path / "back" / "config.json").read_bytes() == (llama / "config.json").read_bytes()
        assert (tmp_path / "back" / "generation_config.json").is_file()

    def test_layout_2(self, llama: Path, actor: Path) -> None:
        (actor / "model").mkdir()
        for name in ("dist_ckpt", "huggingface"):
            (actor / name).rename(actor / "model" / name)
        (actor / "optimizer" / "dist_ckpt").mkdir(parents=True)
        assert open_checkpoint(actor).path == actor / "model" / "dist_ckpt"
        assert diff(llama, actor).same

    def test_weights_in_huggingface(self, llama: Path, actor: Path) -> None:
        """mbridge: `dist_ckpt` has the optimizer alone, or is empty; with a model in it, nothing says which counts."""
        shutil.copy(llama / "model.safetensors", actor / "huggingface")
        with pytest.raises(UsageError, match="two sets of weights, in dist_ckpt/ and in huggingface/"):
            open_checkpoint(actor)
        assert open_checkpoint(actor, hf_reference=actor / "huggingface").format == "torch_dist"
        assert open_checkpoint(actor / "dist_ckpt").format == "torch_dist"
        assert open_checkpoint(actor / "huggingface").format == "hf"
        shutil.rmtree(actor / "dist_ckpt")
        (actor / "dist_ckpt").mkdir()
        checkpoint = open_checkpoint(actor)
        assert (checkpoint.format, checkpoint.path) == ("hf", actor / "huggingface")

    def test_a_reference_that_does_not_fit(self, actor: Path) -> None:
        config = actor / "huggingface" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 145}))
        with pytest.raises(InputError, match=r"args say ffn_hidden_size 144, config\.json says 145"):
            open_checkpoint(actor)

    def test_neither_weights_nor_config(self, actor: Path) -> None:
        shutil.rmtree(actor / "dist_ckpt")
        with pytest.raises(InputError, match="not a checkpoint that ckptkit knows"):
            open_checkpoint(actor)


class TestStatedGrids:
    """`mp_rank_*` files without `args`; a reference says what the model is."""

    @pytest.mark.parametrize(
        ("grid", "stated"),
        [
            (Parallelism(2, 2), StatedGrid()),
            (Parallelism(2, 2), StatedGrid(tp=2, pp=2)),
            (Parallelism(1, 2, 2), StatedGrid(pp=2, vpp=2)),
            (Parallelism(1, 2, first_stage_layers=1), StatedGrid(pp=2, first_stage_layers=1)),
            (Parallelism(1, 2, last_stage_layers=1), StatedGrid(pp=2, last_stage_layers=1)),
        ],
        ids=str,
    )
    def test_what_args_would_have_said(
        self, llama: Path, converted: Callable[..., Path], tmp_path: Path, grid: Parallelism, stated: StatedGrid
    ) -> None:
        path = trained(converted("torch", grid), tmp_path / "ranks", args=False)
        checkpoint = open_checkpoint(path, hf_reference=llama, stored_grid=stated)
        assert checkpoint.grid == grid and any("there are no args" in note for note in checkpoint.notes)
        convert(path, tmp_path / "back", to="hf", hf_reference=llama, stored_grid=stated)
        assert (tmp_path / "back" / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()

    def test_experts(self, tmp_path: Path) -> None:
        """`mp_rank_00_001` may be of the second stage, or of the second expert parallel rank."""
        source = save_model(tmp_path / "moe", "qwen3_moe")
        convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2, ep=2, etp=1))
        path = trained(tmp_path / "meg", tmp_path / "ranks", args=False)
        with pytest.raises(CkptkitError):
            open_checkpoint(path, hf_reference=source)
        checkpoint = open_checkpoint(path, hf_reference=source, stored_grid=StatedGrid(ep=2, etp=1))
        assert checkpoint.grid == Parallelism(2, ep=2, etp=1)
        convert(path, tmp_path / "back", to="hf", hf_reference=source, stored_grid=StatedGrid(ep=2, etp=1))
        assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()

    def test_contradictions(self, llama: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
        source = converted("torch", Parallelism(2, 2))
        assert open_checkpoint(source, stored_grid=StatedGrid(tp=2)).grid == Parallelism(2, 2)
        with pytest.raises(UsageError, match="--src-tp 4, but args say 2"):
            open_checkpoint(source, stored_grid=StatedGrid(tp=4))
        path = trained(source, tmp_path / "ranks", args=False)
        with pytest.raises(UsageError, match="--src say TP1 x PP2, the folders make TP2 x PP2"):
            open_checkpoint(path, hf_reference=llama, stored_grid=StatedGrid(tp=1, pp=2))
        with pytest.raises(InputError, match="mp_rank_02_000 is missing"):
            open_checkpoint(path, hf_reference=llama, stored_grid=StatedGrid(tp=4))
        with pytest.raises(UsageError, match=r"--src-\* applies only to mp_rank checkpoints; this is hf"):
            open_checkpoint(llama, stored_grid=StatedGrid(tp=2))

    def test_a_reference_is_needed(self, converted: Callable[..., Path], tmp_path: Path) -> None:
        path = trained(converted("torch", Parallelism()), tmp_path / "ranks", args=False)
        with pytest.raises(InputError, match=r"args lack num_layers.*--hf-reference"):
            open_checkpoint(path)


class TestVocabulary:
    """250 tokens, 256 rows: without sidecar, reference and `args.vocab_size` nobody knows."""

    @pytest.fixture
    def path(self, converted: Callable[..., Path], tmp_path: Path) -> Path:
        return trained(converted("torch", Parallelism(2)), tmp_path / "ranks", vocab_size=None)

    def test_stated(self, llama: Path, path: Path, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(path)
        assert checkpoint.config.vocab_size == 256
        assert any("all 256 stored rows are kept (--vocab-size" in note for note in checkpoint.notes)
        stated = open_checkpoint(path, vocab_size=250)
        assert stated.config.vocab_size == 250
        assert not any("stored rows are kept" in note for note in stated.notes)
        convert(path, tmp_path / "back", to="hf", vocab_size=250)
        assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 250
        found = diff(llama, tmp_path / "back")
        assert found.equal == found.compared == 39 and not found.structure.shapes

    @pytest.mark.parametrize("wrong", [257, 0, -1])
    def test_more_than_there_are(self, path: Path, wrong: int) -> None:
        with pytest.raises(UsageError, match=f"--vocab-size {wrong}, but 256 rows are stored"):
            open_checkpoint(path, vocab_size=wrong)

    def test_known_already(self, llama: Path, path: Path) -> None:
        assert open_checkpoint(llama, vocab_size=250).config.vocab_size == 250
        for source, reference in ((llama, None), (path, llama)):
            with pytest.raises(UsageError, match="--vocab-size 251, but the checkpoint says 250"):
                open_checkpoint(source, vocab_size=251, hf_reference=reference)


class TestOptimizer:
    def test_inside_the_rank_files(self, converted: Callable[..., Path], llama: Path, tmp_path: Path) -> None:
        import torch

        path = trained(converted("torch", Parallelism(2)), tmp_path / "ranks")
        moments = torch.zeros(100, dtype=torch.float32)
        state = {"optimizer": {"state": {0: {"exp_avg": moments, "exp_avg_sq": torch.ones(50)}}, "param_groups": []}}
        edit(path / "mp_rank_01" / "model_optim_rng.pt", lambda c: c.update(optimizer=[state, {"again": moments}]))
        (path / "mp_rank_00" / "distrib_optim.pt").write_bytes(b"x" * 1000)
        found = inspect(path)
        assert found.optimizer == {"tensors": 2, "nbytes": 1600}
        sentence = "the optimizer's state (2 tensors, 1,600 bytes) is left out"
        assert sentence in found.notes
        result = convert(path, tmp_path / "back", to="hf", hf_reference=llama, dry_run=True)
        assert sentence in result.notes and not (tmp_path / "back").exists()
        convert(path, tmp_path / "back", to="torch", hf_reference=llama)
        assert inspect(tmp_path / "back").optimizer == {"tensors": 0, "nbytes": 0}
        assert diff(llama, tmp_path / "back").same

    def test_without_one(self, converted: Callable[..., Path]) -> None:
        found = inspect(converted("torch", Parallelism(2)))
        assert found.optimizer == {"tensors": 0, "nbytes": 0}
        assert not any("optimizer" in note for note in found.notes)

    def test_beside_the_model_in_torch_dist(self, llama: Path, converted: Callable[..., Path], tmp_path: Path) -> None:
        """A second checkpoint of the container, whose one key is the optimizer's, merged into the metadata."""
        import pickle

        import torch
        import torch.distributed.checkpoint as dcp

        folder = trained(converted("torch_dist", Parallelism(2)), tmp_path / "iter_0000001")
        dcp.save({"optimizer.state.exp_avg.w": torch.zeros(6, 5)}, checkpoint_id=tmp_path / "own", no_dist=True)
        (tmp_path / "own" / "__0_0.distcp").rename(folder / "__9_0.distcp")
        own = pickle.loads((tmp_path / "own" / ".metadata").read_bytes())
        whole = pickle.loads((folder / ".metadata").read_bytes())
        whole.state_dict_metadata.update(own.state_dict_metadata)
        for index, place in own.storage_data.items():
            place.relative_path = "__9_0.distcp"
            whole.storage_data[index] = place
        (folder / ".metadata").write_bytes(pickle.dumps(whole))
        found = inspect(folder)
        assert found.optimizer == {"tensors": 1, "nbytes": 120}
        assert "the optimizer's state (1 tensor, 120 bytes) is left out" in found.notes
        assert diff(llama, folder, hf_reference=llama).same


def test_a_hugging_face_directory_takes_no_reference(llama: Path) -> None:
    with pytest.raises(UsageError, match="takes no reference; drop --hf-reference"):
        open_checkpoint(llama, hf_reference=llama)
