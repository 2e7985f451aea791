"""The report of a verification: its record, and how it is drawn on a terminal, as a page and for CI."""
