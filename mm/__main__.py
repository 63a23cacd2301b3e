"""`python -m mm`."""

import sys
from pathlib import Path

# `python -m` looks for modules in the current folder first, whoever's it is. Code of one's own
# is found there by PYTHONPATH=.; a checkout of this project is its own folder.
if not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).resolve().parents[1]:
    del sys.path[0]

from mm.cli.main import main  # noqa: E402

main()
