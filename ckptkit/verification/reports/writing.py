"""Reports as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckptkit.errors import CkptkitError, UsageError
from ckptkit.verification.reports.html import html_page
from ckptkit.verification.reports.junit import junit_error, junit_xml
from ckptkit.verification.reports.markdown import markdown_error, markdown_text
from ckptkit.verification.reports.report import VerificationReport


def check_places(*paths: str | None) -> None:
    """Refuse files that could not be written, before hours of verification.

    Raises:
        UsageError: A directory does not exist.
    """
    for path in paths:
        if path not in (None, "-") and not Path(str(path)).resolve().parent.is_dir():
            raise UsageError("its directory does not exist", where=path, hint="create it first")


Document = Callable[[str, str], None]
"""Writes a text to a file, or to stdout if that is `-`."""


@dataclass(frozen=True)
class Reports:
    """The reports asked for, beside the JSON; each is a file or None.

    Attributes:
        junit: JUnit XML.
        html: The HTML page.
        markdown: Markdown; `-` is stdout.
    """

    junit: str | None = None
    html: str | None = None
    markdown: str | None = None

    def write(self, report: VerificationReport, write: Document) -> None:
        """Writes them.

        Args:
            report: The report.
            write: Writes a file.

        Raises:
            StorageError: A file cannot be written.
        """
        if self.junit is not None:
            write(junit_xml(report), self.junit)
        if self.html is not None:
            write(html_page(report), self.html)
        if self.markdown is not None:
            write(markdown_text(report), self.markdown)

    @contextmanager
    def errors(self, reference: str, candidate: str, write: Document) -> Iterator[None]:
        """Writes an error inside the context as a test case with an error and as Markdown, and raises it again."""
        try:
            yield
        except CkptkitError as error:
            if self.junit is not None:
                write(junit_error(error, reference, candidate), self.junit)
            if self.markdown is not None:
                write(markdown_error(error, reference, candidate), self.markdown)
            raise
