"""`python -m ckptkit` is the command `ckptkit`."""

from ckptkit.cli import app

app(prog_name="ckptkit")
