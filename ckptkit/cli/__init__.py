"""The command line: commands, options, output. The only room that imports typer and rich."""
