"""`pretrain_gpt.py` of Megatron-LM trains what `convert` writes, with the flags that it prints.

MEGATRON_LM names a folder with `pretrain_gpt.py`, `gpt_builders.py` and `model_provider.py` of Megatron-LM,
core_v0.19.0; the rest of it is megatron-core's wheel. With a learning rate of zero, what it saves comes back equal.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.sharding.grid import Parallelism
from tests.formats.rank_pool import ROOT, RankProcesses
from tests.te.test_loads import grid_words

pytestmark = pytest.mark.te

ITERATIONS = 3


@pytest.fixture(scope="module")
def script() -> Path:
    """The file `pretrain_gpt.py`."""
    found = Path(os.environ.get("MEGATRON_LM", "")) / "pretrain_gpt.py"
    if not found.is_file():
        pytest.skip("MEGATRON_LM names no folder with pretrain_gpt.py")
    return found


def train(script: Path, ranks: int, flags: list[str], folder: Path) -> str:
    """What a run of a few iterations says."""
    run = {
        "tokenizer-type": "NullTokenizer",
        "vocab-size": 249,
        "micro-batch-size": 1,
        "global-batch-size": 4,
        "train-iters": ITERATIONS,
        "lr": 0.0,
        "min-lr": 0.0,
        "lr-decay-style": "constant",
        "eval-iters": 0,
        "eval-interval": 100,
        "log-interval": 1,
        "save-interval": ITERATIONS,
        "load": folder / "m",
        "save": folder / "saved",
        "moe-token-dispatcher-type": "alltoall",
    }
    switches = ["--mock-data", "--no-gradient-accumulation-fusion", "--exit-on-missing-checkpoint"]
    words = [*flags, *switches, *(word for name, value in run.items() for word in (f"--{name}", str(value)))]
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",  # all ranks are here; the host's name may not resolve
        "PYTHONPATH": os.pathsep.join([str(script.parent), str(ROOT), *(path for path in sys.path if path)]),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(ranks)]
    ended = subprocess.run(
        [*command, str(script), *words],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=280,
        check=False,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said[-6000:]
    return said


@pytest.mark.parametrize(
    ("kind", "to", "grid"),
    [
        ("qwen3", "torch_dist", {}),
        ("gqa", "torch", {"pp": 2}),
        ("qwen3_moe", "torch_dist", {"ep": 2}),
        ("mistral", "torch_dist", {"tp": 2}),
    ],
    ids=str,
)
def test_training(
    te_ranks: RankProcesses,
    computing: None,
    prepared: Callable[[str], tuple[Path, Path, float]],
    report: Callable[[dict[str, object]], None],
    script: Path,
    tmp_path: Path,
    kind: str,
    to: str,
    grid: dict[str, int],
) -> None:
    import torch
    from safetensors.torch import load_file

    own, (source, _, _) = Parallelism(**grid), prepared(kind)
    if te_ranks.size < own.world_size:
        pytest.skip("needs two CUDA devices")
    flags = convert(source, tmp_path / "m", to=to, grid=own).target["megatron_flags"]
    flags = [*flags, "--ckpt-format", to, *(grid_words(grid) if to == "torch_dist" else [])]
    said = train(script, own.world_size, flags, tmp_path)
    losses = [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", said)]
    convert(tmp_path / "saved", tmp_path / "back", to="hf", hf_reference=source)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    different = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    passed = len(losses) == ITERATIONS and "at iteration 0" in said and not different
    about = {"program": "pretrain_gpt.py", "losses": losses, "tensors": len(before), "different": different}
    report({"kind": kind, "to": to, "grid": str(own), **about, "passed": passed})
    assert passed and before.keys() == after.keys(), (losses, different, said[-3000:])
