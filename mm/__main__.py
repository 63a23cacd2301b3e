"""`python -m mm`."""

from mm.cli.main import main

main()
