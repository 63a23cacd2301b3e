"""Child of trainer_runs.torchrun, under torchrun.

Train every run YAML named on the command line, in turn.
"""

import sys

from mm.launch import environment

environment.prepare()

if __name__ == "__main__":
    from mm.trainer.loop import INTERRUPTED, train

    for path in sys.argv[1:]:
        try:
            train(path)
        except SystemExit as stop:
            assert stop.code == INTERRUPTED, stop.code
