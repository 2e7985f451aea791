"""What `verify` and `diff` advise can be followed: options for either side, grids, further levels, where to look."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptkit import convert, diff, verify
from ckptkit.checkpoints.source_options import SourceOptions
from ckptkit.cli.app import app
from ckptkit.errors import InputError, UsageError
from ckptkit.sharding.grid import Parallelism
from ckptkit.verification.ranks.pool import RankPool
from tests.models import LLAMAS, save_llama, save_model
from tests.verification.test_verify import change_tensor

Saved = Callable[..., Path]


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="ckptkit")


@pytest.fixture
def bare(llama: Saved, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a Megatron checkpoint of it in two iterations that does not describe itself; the second is wrong."""
    source = llama("gqa", num_hidden_layers=2)
    root = tmp_path / "run"
    convert(source, root, to="torch", grid=Parallelism(2))
    shutil.rmtree(root / "ckptkit")
    (root / "release").rename(root / "iter_0000001")
    shutil.copytree(root / "iter_0000001", root / "iter_0000002")
    (root / "latest_checkpointed_iteration.txt").write_text("2")
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    change_tensor(root / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt", name, lambda weight: weight * 1.5)
    return source, root


def test_either_side_takes_every_opening_option(bare: tuple[Path, Path], pool: RankPool) -> None:
    source, root = bare
    right = SourceOptions(str(source), 1)
    assert verify(source, root, candidate_source=right, pool=pool, tolerance=1e-5).passed
    assert verify(root, source, reference_source=right, pool=pool, tolerance=1e-5).passed
    assert verify(root, root, reference_source=right, candidate_source=right, pool=pool, tolerance=1e-5).passed
    wrong = SourceOptions(str(source), 2)
    report = verify(source, root, candidate_source=wrong, pool=pool)
    assert [level.passed for level in report.levels] == [True, False]
    assert diff(source, root, b_source=right).same and diff(root, source, a_source=right).same
    assert not diff(root, root, a_source=right, b_source=wrong).same


def test_on_the_command_line(bare: tuple[Path, Path]) -> None:
    source, root = bare
    cand = ("--cand-iteration", 1, "--cand-hf-reference", source)
    assert command("verify", source, root, "--level", "weights", *cand).exit_code == 0
    ref = ("--ref-iteration", 1, "--ref-hf-reference", source)
    assert command("verify", root, source, "--level", "weights", *ref).exit_code == 0
    assert command("verify", root, source, "--level", "weights", "--ref-hf-reference", source).exit_code == 1
    assert command("diff", root, root, "--a-iteration", 1, "--b-iteration", 2).exit_code == 1
    assert command("diff", root, root, "--a-iteration", 1, "--b-iteration", 1).exit_code == 0
    assert command("diff", source, root, "--hf-reference", source, "--b-iteration", 1).exit_code == 0


@pytest.mark.parametrize(("name", "prefixes"), [("verify", ("ref", "cand")), ("diff", ("a", "b"))])
def test_hints_name_the_options_of_their_side(bare: tuple[Path, Path], name: str, prefixes: tuple[str, str]) -> None:
    source, root = bare
    for prefix, sides in zip(prefixes, ((root, source), (source, root)), strict=True):
        for option, value in (("vocab-size", 7), ("src-tp", 7), ("iteration", 7)):
            result = command(name, *sides, f"--{prefix}-{option}", value)
            assert result.exit_code in (2, 3), result.output
            if option != "iteration":
                assert f"--{prefix}-{option}" in result.stderr and f" --{option}" not in result.stderr


def test_a_difference_says_how_much_how_large_and_where(bare: tuple[Path, Path]) -> None:
    source, root = bare
    result = command("verify", source, root, "--level", "weights", "--cand-hf-reference", source)
    text = " ".join(result.stdout.split())
    assert result.exit_code == 1
    assert "decoder.layers.1.mlp.linear_fc2.weight" in text
    report = verify(source, root, level="weights", candidate_source=SourceOptions(str(source)))
    level = report.levels[-1]
    counted, hint = level.messages
    assert "elements of these tensors differ, by at most" in counted and "worst: decoder.layers.1" in counted
    assert hint.startswith("every difference: ckptkit diff ")
    words = shlex.split(hint.partition("ckptkit ")[2])
    followed = command(*words, "--json")  # the hint is a command that works
    assert followed.exit_code == 1
    found = json.loads(followed.stdout)["tensors"]
    assert [item["name"] for item in found] == ["model.layers.1.mlp.down_proj.weight"]
    (item,) = found
    assert f"{item['differing']:,} of {item['elements']:,}" in counted
    assert f"{item['largest']:.3g}" in counted


def test_the_worst_are_named_first(llama: Saved, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = llama("gqa")
    other = tmp_path / "other"
    shutil.copytree(source, other)
    tensors = load_file(other / "model.safetensors")
    names = [name for name in sorted(tensors) if name.endswith(("o_proj.weight", "down_proj.weight"))]
    assert len(names) == 8
    for step, name in enumerate(names):
        tensors[name][0, 0] += 2.0**step
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    level = verify(source, other, level="weights").levels[-1]
    assert "8 of " in level.messages[0] and "by at most 128" in level.messages[0] and "and 3 more" in level.messages[0]
    assert "(by 128), " in level.messages[0] and "(by 1)" not in level.messages[0]


def test_further_levels_can_be_asked(bare: tuple[Path, Path], pool: RankPool) -> None:
    source, root = bare
    wrong = SourceOptions(str(source), 2)
    report = verify(source, root, candidate_source=wrong, keep_going=True, pool=pool)
    assert [level.passed for level in report.levels] == [True, False, False] and report.not_run == []
    assert report.levels[2].details["location"]["place"] == "layer 1 mlp"


def test_further_levels_of_models_that_do_not_fit(llama: Saved, pool: RankPool) -> None:
    """Names and shapes differ: what can be compared is, and what has no answer does not hide the difference."""
    two, three = llama("gqa", num_hidden_layers=2), llama("gqa", num_hidden_layers=3)
    report = verify(two, three, keep_going=True, pool=pool)
    assert [level.name for level in report.levels] == ["structure", "weights", "logits"]
    assert not report.passed
    assert "could not be compared: their names or shapes differ" in str(report.levels[1].details["problems"])
    wide = llama("gqa", num_hidden_layers=2, vocab_size=240)
    report = verify(two, wide, keep_going=True, tokens=[[1, 245]], pool=pool)
    assert not report.passed and "vocabular" in report.levels[2].summary
    assert report.not_run == [] or report.messages


def test_a_level_without_an_answer_does_not_hide_a_difference(llama: Saved, tmp_path: Path, pool: RankPool) -> None:
    source = llama("gqa", num_hidden_layers=2)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5, "attention_dropout": "a"}))
    report = verify(source, other, keep_going=True, pool=pool)
    assert not report.passed and report.not_run == ["logits"]
    assert any("the level logits has no answer" in text and "attention_dropout" in text for text in report.messages)
    shutil.copy(source / "config.json", other / "config.json")
    (other / "config.json").write_text(json.dumps({**config, "attention_dropout": "a"}))
    with pytest.raises(InputError):  # nothing differs before it: there is no verdict
        verify(source, other, keep_going=True, pool=pool)


@pytest.mark.parametrize(
    ("kind", "to", "grid"),
    [
        ("gqa", "hf", {"tp": 2}),
        ("gqa", "hf", {"pp": 2}),
        ("gqa", "packed", {"tp": 2, "pp": 2}),
        ("gqa", "packed", {"tp": 1}),
        ("mixtral", "hf", {"ep": 2}),
        ("mixtral", "packed", {"tp": 2, "ep": 2}),
    ],
)
def test_a_candidate_without_a_grid_runs_on_one(
    tmp_path: Path, pool: RankPool, kind: str, to: str, grid: dict[str, int]
) -> None:
    source = (save_llama if kind in LLAMAS else save_model)(tmp_path / "source", kind)
    convert(source, tmp_path / "out", to=to)
    report = verify(source, tmp_path / "out", tolerance=1e-5, pool=pool, **grid)
    assert report.passed, report.levels[-1].summary
    assert any("ColumnParallelLinear" in name for name in report.levels[-1].details["megatron_modules"])
    assert report.sides["candidate"].grid["tp"] == grid.get("tp", 1)
    assert len(report.sides["candidate"].ranks) == Parallelism(**grid).world_size


def test_grids_that_make_no_sense(llama: Saved, tmp_path: Path) -> None:
    source = llama("gqa", num_hidden_layers=2)
    convert(source, tmp_path / "meg", to="torch", grid=Parallelism(2))
    with pytest.raises(UsageError, match="this one is on TP2 x PP1"):
        verify(source, tmp_path / "meg", tp=1)
    with pytest.raises(UsageError, match="decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers"):
        verify(source, source, pp=3)
    with pytest.raises(UsageError, match="tp"):
        verify(source, source, tp=7)
    with pytest.raises(UsageError, match="need --level logits"):
        verify(source, source, tp=2, pp=2, level="weights")
    with pytest.raises(UsageError, match="give the grid to run it on"):
        verify(source, source, packed=True)


def test_no_object_of_python_in_a_message(llama: Saved, tmp_path: Path) -> None:
    source = llama("gqa", num_hidden_layers=2)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    rope = {**config["rope_parameters"], "rope_theta": 77777.0}
    (other / "config.json").write_text(json.dumps({**config, "rope_parameters": rope, "tie_word_embeddings": False}))
    problems = verify(source, other, level="structure").levels[0].details["problems"]
    assert any("rope theta is 10000.0 in the reference, 77777.0 in the candidate" in text for text in problems)
    convert(source, tmp_path / "meg", to="torch")
    sidecar = tmp_path / "meg" / "ckptkit" / "hf" / "config.json"
    sidecar.write_text((other / "config.json").read_text())
    problems = verify(source, tmp_path / "meg", level="structure").levels[0].details["problems"]
    assert any("args say rope theta" in text for text in problems)
    assert not any(word in text for text in problems for word in ("Rope(", "Adapter(", "LayerConfig(", "None", "True"))


def test_an_untied_head_says_what_to_set(llama: Saved, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = llama("tied", num_hidden_layers=2)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"set tie_word_embeddings to false in config\.json"):
        convert(other, tmp_path / "out", to="torch")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    convert(other, tmp_path / "out", to="torch")  # as it says
    assert verify(other, tmp_path / "out", level="weights").passed
