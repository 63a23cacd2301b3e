"""Imported by the process that `mm faults` forks its children from, and by nothing else: all that
is slow to start is started here once (DeepSpeed looks for compilers for seconds).
"""

from mm.trainer.engine import deepspeed as engine

engine._deepspeed()
