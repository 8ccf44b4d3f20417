"""`python -m ropewalk` is `ropewalk`."""

from .cli.main import main

main()
