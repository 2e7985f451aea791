"""docs/demo.svg: a real run of the demo's commands, as a terminal shows it.

    python -m docs_site.picture [FOLDER]

FOLDER gets the model of `examples/smollm2.py`, and keeps it. The commands run in a terminal of their own, 100 columns
wide, and what they print becomes an SVG with rich. Nothing of it is edited; of long tables the middle is left out, and
a line says so.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from fcntl import ioctl
from io import StringIO
from pathlib import Path
from termios import TIOCSWINSZ

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "demo.svg"
MODEL, MEGATRON, BACK = "SmolLM2-135M-Instruct", "smollm2-tp3pp2", "smollm2-back"
COMMANDS = (
    ["ckptkit", "convert", MODEL, MEGATRON, "--to", "torch", "--tp", "3", "--pp", "2"],
    ["ckptkit", "verify", MODEL, MEGATRON, "--prompt", "The capital of France is"],
    ["ckptkit", "convert", MEGATRON, BACK, "--to", "hf", "--json"],
    ["diff", "-r", MODEL, BACK],
)
SILENT = {2}
"""Commands whose output is not shown."""
_FONT = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)
COLUMNS, HEAD, TAIL = 100, 11, 12
"""Width of the terminal; lines of a command that are shown at its beginning and at its end."""


def run(command: list[str], folder: Path) -> str:
    """What a command prints on a terminal, colours included.

    Raises:
        RuntimeError: It failed.
    """
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    process = subprocess.Popen(command, cwd=folder, stdout=theirs, stderr=subprocess.PIPE, env=variables)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said}")
    return b"".join(parts).decode().replace("\r\n", "\n")


def shortened(lines: list[str]) -> list[str]:
    """The lines of a command, without the middle of long ones."""
    left_out = len(lines) - HEAD - TAIL
    return lines if left_out < 2 else [*lines[:HEAD], f" ... {left_out} lines", *lines[-TAIL:]]


def render(pairs: list[tuple[str, str]]) -> str:
    """The SVG of commands and what they print.

    Args:
        pairs: Command lines and their output, with the escapes of a terminal.
    """
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    for command, output in pairs:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        for line in shortened(output.rstrip().splitlines()):
            console.print(Text.from_ansi(line.rstrip()))
        console.print()
    svg = console.export_svg(title="ckptkit", unique_id="ckptkit", font_aspect_ratio=0.61)
    return _FONT.sub("", svg)  # a picture loads nothing from elsewhere


def shown(command: list[str]) -> str:
    """A command line as people write it."""
    return " ".join(f'"{word}"' if " " in word else word for word in command)


def main(folder: Path) -> None:
    """Runs the commands, and writes the picture."""
    if not (folder / MODEL).is_dir():
        subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py", folder / MODEL], check=True)
    for made in (MEGATRON, BACK):
        shutil.rmtree(folder / made, ignore_errors=True)
    pairs = []
    for number, command in enumerate(COMMANDS):
        output = run(command, folder)
        line = shown([word for word in command if word != "--json"])
        if number == len(COMMANDS) - 1:
            line, output = f"{line} && echo identical", f"{output}identical\n"
        pairs.append((line, "" if number in SILENT else output))
    PICTURE.write_text(render(pairs), encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)} written")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
