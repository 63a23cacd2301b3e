"""The fault that peers' users found, for `mm verify`: `imports: [sequence_faults]`.

Every process begins its recurrences anew (accelerate #4177, DeepSpeed #8114).
"""

from mm.model.mixers.ssm import scan

scan.carry_over = lambda fresh, *_: fresh()
