"""What is slow to start, started once in the process that `mm faults` forks its children from.

DeepSpeed looks for compilers for seconds.
"""

from mm.trainer.engine import deepspeed as engine

engine._deepspeed()
