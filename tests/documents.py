"""The commands on the pages of docs/, and a folder with tiny models under the names that the pages use."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from ckptkit import Parallelism, convert
from ckptkit.cli import app as cli
from tests.lora import save_adapter
from tests.models import save_llama, save_model
from tests.surgery.pairs import save_pair

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_COMMAND = re.compile(r"^\$ ckptkit (.+?)(?:  # exit code (\d+))?$", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A command on a page.

    Attributes:
        line: What stands after `$ ckptkit`.
        code: The exit code that the page says, 0 unless it does.
    """

    line: str
    code: int

    @property
    def arguments(self) -> list[str]:
        """Its arguments."""
        return shlex.split(self.line)

    @property
    def runs_models(self) -> bool:
        """Whether it verifies at a level that runs models."""
        words = self.arguments
        return words[0] == "verify" and not {"structure", "weights"} & set(words)


def commands_of(page: str) -> list[Command]:
    """The commands on a page, in order.

    Args:
        page: Its name in docs/.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    return [Command(line, int(code or 0)) for line, code in _COMMAND.findall(text)]


def run(command: Command) -> None:
    """Runs a command in the current folder, and compares its exit code."""
    done = CliRunner().invoke(cli.app, command.arguments, prog_name="ckptkit")
    assert done.exit_code == command.code, f"$ ckptkit {command.line}\n{done.output}"


def prepare(folder: Path, page: str) -> None:
    """Writes what the commands of a page begin with."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if "Qwen3-8B" in text:
        save_model(folder / "Qwen3-8B", "qwen3")
    if re.search(r"^\$ ckptkit .* checkpoints ", text, re.MULTILINE):
        _trained(folder)
    if "verl-run" in text:
        _verl(folder)
    if "Llama-70B" in text:
        for made, name in zip(save_pair(folder / "pair"), ("Llama-8B", "Llama-70B"), strict=True):
            made.rename(folder / name)
    if "merge.yml" in text:
        for name in ("math", "code"):
            save_llama(folder / name)
        recipe = "merge_method: slerp\nbase_model: math\nmodels: [{model: math}, {model: code}]\nparameters: {t: 0.3}\n"
        (folder / "merge.yml").write_text(recipe + "dtype: bfloat16\n", encoding="utf-8")
    if "ckptkit convert adapter " in text:
        save_adapter(folder / "adapter", folder / "Qwen3-8B")


def _trained(folder: Path) -> None:
    """A run of Megatron-LM: iterations, a tracker file, and no sidecar."""
    root = folder / "checkpoints"
    convert(folder / "Qwen3-8B", root, to="torch", grid=Parallelism(tp=2, pp=2))
    shutil.rmtree(root / "ckptkit")
    (root / "release").rename(root / "iter_0001000")
    (root / "latest_checkpointed_iteration.txt").write_text("1000", encoding="utf-8")


def _verl(folder: Path) -> None:
    """A run of verl with FSDP on one rank."""
    import torch
    from safetensors.torch import load_file

    model = save_llama(folder / "model")
    actor = folder / "verl-run" / "global_step_10" / "actor"
    shutil.copytree(model, actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(model / "model.safetensors"), actor / "model_world_size_1_rank_0.pt")
    (folder / "verl-run" / "latest_checkpointed_iteration.txt").write_text("10", encoding="utf-8")


def links(path: Path) -> list[tuple[str, str]]:
    """The links of a page to files: (path, anchor)."""
    found: list[Any] = re.findall(r"\]\(([^)\s:#]*)(?:#([^)\s]*))?\)", path.read_text(encoding="utf-8"))
    return [(target, anchor) for target, anchor in found if target or anchor]
