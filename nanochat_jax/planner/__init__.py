"""What a run will need and cost, before a GPU is rented: `python -m scripts.plan`.

compile.py, child.py: the real programs compiled for a card that is not there (its limits are in hardware/gpus.py);
hlo.py: what the compiled program moves and computes; memory.py: the estimate where it cannot be compiled; cost.py: time
and dollars; main.py: the command.
"""
