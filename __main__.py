"""`python -m ropewalk` runs the `ropewalk` command."""

from .cli.main import main

main()
