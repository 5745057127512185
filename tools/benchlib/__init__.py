"""The benchmark: each piece of work beside its rivals, in turns, so that a noisy machine is noisy for all of them.

`runs` times commands; `corpus` makes a disk of real files; `work` has one function per row of the table.
"""
