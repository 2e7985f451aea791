"""The benchmarks run: they are commands that nobody waits for, and follow the package they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import planning, processes
from fixtures.make_damaged import SOUND

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_phases_make_the_same_files_as_the_command(tmp_path: Path) -> None:
    grid = ("--to", "torch", "--tp", "2")
    phases = json.loads(run("benchmarks.phases", str(SOUND / "hf"), str(tmp_path / "phases"), *grid))
    run("ckptkit", "convert", str(SOUND / "hf"), str(tmp_path / "command"), *grid)
    written = {path.relative_to(tmp_path / "command") for path in (tmp_path / "command").rglob("*") if path.is_file()}
    assert phases["files"] == len(written)
    assert phases["bytes"] == sum((tmp_path / "command" / path).stat().st_size for path in written)
    assert {"import", "open", "plan", "move", "commit"} <= phases["seconds"].keys()
    for path in written:
        assert (tmp_path / "phases" / path).read_bytes() == (tmp_path / "command" / path).read_bytes()


@pytest.mark.slow
def test_the_table_and_the_plot(tmp_path: Path) -> None:
    small = ("--size-gb", "0.01", "--repeat", "1", "--dir", str(tmp_path))
    table = run("benchmarks", *small, "--no-alternatives", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    for conversion in figures["conversions"]:
        assert f"| {conversion['name']} |" in table
    experts = run("benchmarks", *small, "--no-alternatives", "--shape", "tiny-moe")
    assert all(f"| {name} |" in experts for name in ("hf -> torch_dist TP2 x EP4", "packed -> hf"))
    run("benchmarks", *small, "--growth", "0.01,0.02", "--shape", "tiny", "--plot", str(tmp_path / "growth.svg"))
    assert (tmp_path / "growth.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_the_table_of_threads(tmp_path: Path) -> None:
    small = ("--size-gb", "0.01", "--repeat", "1", "--shape", "tiny-moe", "--dir", str(tmp_path))
    table = run("benchmarks.cores", *small, "--threads", "1,2")
    assert table.startswith("| threads | `xargs -P N cp` |") and "\n| 2 | " in table


@pytest.mark.slow
def test_the_table_of_quantised_models(tmp_path: Path) -> None:
    small = ("--size-gb", "0.01", "--repeat", "1", "--shape", "tiny", "--dir", str(tmp_path))
    table = run("benchmarks.quantised", *small)
    for scheme in ("fp8-block", "int4"):
        assert f"| dequantise, {scheme} | " in table and f"| quantise like the original, {scheme} | " in table
    assert not list(tmp_path.iterdir())


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def changed(option: str, **sizes: int) -> list[str]:
    return [argument for size in {"vocab_size": 500, **sizes}.items() for argument in (option, "{}={}".format(*size))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen3-30B-A3B"])
def test_merging_an_adapter(tmp_path: Path, name: str) -> None:
    sizes = changed("--set", **SMALL)
    if name.startswith("Qwen3"):
        sizes += changed("--set", moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2)
    options = ("--layers", "2", "--rank", "2", "--repeat", "1", "--workdir", str(tmp_path))
    table = run("benchmarks.adapters", name, *options, "--json", str(tmp_path / "figures.json"), *sizes)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["same"] and {"cp", "ckptkit", "peft", "export"} <= figures["tools"].keys()
    assert figures["adapter_bytes"] <= figures["bytes_read"]
    assert all(f"| {tool} |" in table for tool in figures["tools"])


@pytest.mark.slow
def test_surgery(tmp_path: Path) -> None:
    sizes = changed("--set", num_hidden_layers=4, **SMALL)
    where = ("--workdir", str(tmp_path / "work"), "--json", str(tmp_path / "figures.json"))
    table = run("benchmarks.surgery", "Llama-3.2-1B", "--repeat", "1", *where, *sizes)
    runs = json.loads((tmp_path / "figures.json").read_text())["runs"]
    assert {"ties: ckptkit merge", "passthrough: ckptkit merge", "average: ckptkit average"} <= runs.keys()
    assert "| average | ckptkit average |" in table


@pytest.mark.slow
def test_a_released_model_shrunk(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    sizes = changed("--set", **SMALL, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2)
    where = ("--workdir", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--json", str(figures))
    row = run("benchmarks.big_models", "Qwen3-30B-A3B", "--layers", "2", "--ep", "2", *where, *sizes)
    found = json.loads(figures.read_text())
    assert found["report"]["verdict"] == "same" and found["grid"] == "EP2" and "| Qwen3-30B-A3B | 2 |" in row
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_split_llama_shrunk(tmp_path: Path) -> None:
    figures, wide = tmp_path / "figures.json", {**SMALL, "hidden_size": 128, "num_attention_heads": 8}
    sizes = [*changed("--set", **SMALL), *changed("--set-last", **wide)]
    how = ("--first-layers", "2", "--last-layers", "2", "--fit", "lstsq", "--tokens", "1024", "--tp", "2")
    table = run("benchmarks.big_split", "--workdir", str(tmp_path / "work"), "--json", str(figures), *how, *sizes)
    assert json.loads(figures.read_text())["verified"]["report"]["verdict"] == "same"
    assert "| split-llama build |" in table and "| split-llama fit, lstsq of 1024 tokens |" in table


@pytest.mark.slow
def test_training_a_split_llama() -> None:
    wide = {**SMALL, "hidden_size": 128, "num_attention_heads": 8}
    sizes = [*changed("--set", **SMALL), *changed("--set-last", **wide)]
    how = ("--first-layers", "2", "--last-layers", "1", "--longest", "32", "--capacity", "64", "--repeat", "1")
    table = run("benchmarks.split_training", *how, *sizes)
    for case in ("2 layers of 8B, 1 of 70B | all", "2 layers of 8B, 1 of 70B | adapter", "2 layers of 8B | all"):
        assert table.count(f"| {case} |") == 2
    assert table.count("| packed |") == table.count("| padded |") == 3


@pytest.mark.slow
def test_the_table_of_trainability(tmp_path: Path) -> None:
    from tests.verification.trainability.test_trainability import fresh

    path, figures = fresh(tmp_path, "llama"), tmp_path / "figures.json"
    table = run("benchmarks.trainability", str(path), "--seeds", "2", "--packed", "--json", str(figures))
    answers = json.loads(figures.read_text())
    assert [answer["seed"] for answer in answers] == [0, 1] and all(answer["passed"] for answer in answers)
    assert table.count("| learns |") == 2 and all(f"| {answer['final_error']:.2f} |" in table for answer in answers)


def test_plans_are_measured_on_sparse_files(tmp_path: Path) -> None:
    model = planning.Experts("small", layers=2, experts=4, hidden=64, ffn=32, heads=16, head_dim=8, vocab=256)
    assert planning.write_sparse(tmp_path / "hf", model) == 3 + 2 * (9 + 3 * 4)
    cpu, peak = planning.measure(("inspect",), tmp_path / "hf", tmp_path / "out")
    assert cpu > 0 and peak > 1
    grid = ("--tp", "2", "--ep", "2")
    planning.measure(("convert", "--to", "torch_dist", *grid), tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_table_of_transformer_engine(tmp_path: Path) -> None:
    """The worst figure of a kind; what failed is said; runs of another shape are printed one by one."""
    where = {"versions": {"torch": "2.11.0"}, "devices": ["H200"]}
    load = {"kind": "qwen3", "to": "torch_dist", "grid": "TP2", "modules": [], "floors": 0.5, **where}
    lines: list[dict[str, object]] = [
        {"test": "a", **load, "dtype": "fp32", "max": 1e-6, "passed": True},
        {"test": "b", **load, "dtype": "fp32", "max": 2e-3, "passed": False},
        {"test": "c", **load, "dtype": "bf16", "max": 1e-2, "passed": True, "floors": 0.93},
        {"test": "keys", "different": [], **where},
    ]
    (tmp_path / "te.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    table = run("benchmarks.te_table", str(tmp_path / "te.jsonl"))
    assert "| qwen3 | TP2 (torch_dist) | 2.0e-03 | TP2 (torch_dist) | 0.93 | differs |" in table
    assert '| keys | {"different": []} |' in table and "H200; torch 2.11.0" in table


def test_computed_times_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert processes.computed(processes.PER_NODE, processes.FILE_SYSTEM) in page


@pytest.mark.slow
def test_many_processes_are_measured(tmp_path: Path) -> None:
    small = ("--size-gb", "0.05", "--shape", "tiny", "--repeat", "1", "--processes", "1,2", "--dir", str(tmp_path))
    table = run("benchmarks.processes", *small)
    assert table.count("| 2 |") == len(processes.CONVERSIONS)
