"""What a run will need and cost, before a GPU is rented: `python -m scripts.plan`.

target.py, compiled.py, child.py: the real programs compiled for a card that is not there (cards.py beside this folder);
hlo.py: what the compiled program moves and computes; memory.py: the estimate where it cannot be compiled; roofline.py,
budget.py: time and dollars; main.py: the command.
"""
