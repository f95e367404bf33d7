"""What a step costs in memory, time and forward passes, before it is taken.

needs.py     what a step of a method asks of a machine: the one place where a method is read
cost.py      forward passes a step, and the steps that a budget pays for
meta.py      a model and a scheme's parameters on the meta device, from a config alone
tally.py     bytes and operations counted while a step runs there
counted.py   a step run there: its peak beside the weights
rates.py     what devices sustain, and the seconds of a step
estimate.py  all of it together, and rows beside each other
memory.py    what a run took on this machine, and what back-propagation would have taken
"""
