"""All that a GPU is wanted for, as one queue: `python -m benchmarks gpu --lease`.

A GPU is lent for minutes at a time, so jobs run in order of worth, each in a process of its own with a limit, one at a
time. Each result is written at once, and the next lease goes on where the last one ended.
"""
