"""`python -m ckptkit` is the command `ckptkit`."""

from ckptkit.cli.app import app

app(prog_name="ckptkit")
