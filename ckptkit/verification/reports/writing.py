"""Reports as files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptkit.errors import CkptkitError, UsageError
from ckptkit.io.system import write_text
from ckptkit.verification.reports.html import html_page
from ckptkit.verification.reports.junit import junit_error, junit_xml
from ckptkit.verification.reports.report import VerificationReport


def check_places(*paths: str | None) -> None:
    """Refuse files that could not be written, before hours of verification.

    Raises:
        UsageError: A directory does not exist.
    """
    for path in paths:
        if path not in (None, "-") and not Path(str(path)).resolve().parent.is_dir():
            raise UsageError("its directory does not exist", where=path, hint="create it first")


def write_reports(report: VerificationReport, *, junit: str | None, html: str | None) -> None:
    """Write the reports asked for.

    Args:
        report: The report.
        junit: File for JUnit XML, or None.
        html: File for the HTML page, or None.

    Raises:
        StorageError: A file cannot be written.
    """
    if junit is not None:
        write_text(junit, junit_xml(report))
    if html is not None:
        write_text(html, html_page(report))


@contextmanager
def errors_reported(junit: str | None, reference: str, candidate: str) -> Iterator[None]:
    """Writes an error inside the context as a test case with an error, and raises it again."""
    try:
        yield
    except CkptkitError as error:
        if junit is not None:
            write_text(junit, junit_error(error, reference, candidate))
        raise
