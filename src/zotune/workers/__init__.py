"""Processes that take one run together: each has the model and all rows, evaluates some of a step's, and applies all of it.

launcher.py says what started them, group.py has `Workers` and how to `join` them, message.py what travels: scalars, over gloo.
"""
