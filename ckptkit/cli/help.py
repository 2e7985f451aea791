"""Help in groups: each option is listed under its heading. The help is plain text, because rich is slow to import."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class GroupedCommand(TyperCommand):
    """A command whose options are listed under their headings (`rich_help_panel`), without rich."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments, then each heading with its options, then options without one."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        loose: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                groups["Arguments"].append(record)
            elif panel := getattr(parameter, "rich_help_panel", None):
                groups.setdefault(panel, []).append(record)
            else:
                loose.append(record)
        for title, records in {**groups, "Options": loose}.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
