"""Hooks of mkdocs: pages from the files at the top, generated sections, and links to other files of the repository."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from docs_site.generated import SECTIONS  # noqa: E402  the package is beside this file

PAGES = {
    "README.md": "index.md",
    **{name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")},
}
"""File at the top -> page of the site."""
_MARKER = re.compile(r"<!-- generated: ([a-z-]+) -->")
_TARGET = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages from the top, and the files of the repository that pages link to."""
    for source, page in PAGES.items():
        text = _from_top((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / source for source in PAGES)]
    for path in sorted({path for page in pages for path in _outside(page)}):
        if _is_copied(path):
            files.append(File.generated(config, _copy(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fills the markers, and turns links to files above docs/ into links to their copies."""
    here = Path(page.file.src_uri).parent
    up = "../" * len(here.parts)

    def moved(match: re.Match[str]) -> str:
        path, anchor = match["path"], match["anchor"] or ""
        file = (ROOT / "docs" / here / path).resolve()
        if page.file.generated_by or not _is_outside(file):
            return match[0]
        return f"{up}{_copy(file) if _is_copied(file) else PAGES[file.name]}{anchor}"

    filled = _MARKER.sub(lambda match: SECTIONS[match[1]](), markdown)
    return _TARGET.sub(moved, filled)


def _from_top(text: str) -> str:
    """A page of the top with links as from docs/."""

    def moved(match: re.Match[str]) -> str:
        path, anchor = match["path"], match["anchor"] or ""
        file = ROOT / path
        outside = _is_outside(file.resolve()) and _is_copied(file)
        return f"{_copy(file) if outside else PAGES.get(path, path.removeprefix('docs/'))}{anchor}"

    return _TARGET.sub(moved, text)


def _is_copied(file: Path) -> bool:
    """Whether a file is no page, so that the site has a copy of it."""
    return file.parent != ROOT or file.name not in PAGES


def _copy(file: Path) -> str:
    """The place of a copy in the site."""
    return f"files/{file.relative_to(ROOT).as_posix()}"


def _outside(page: Path) -> list[Path]:
    """The files above docs/ that a page links to."""
    found = ((page.parent / match["path"]).resolve() for match in _TARGET.finditer(page.read_text(encoding="utf-8")))
    return [file for file in found if _is_outside(file) and file.is_file()]


def _is_outside(file: Path) -> bool:
    return file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "docs") and file.exists()
