"""Measurements side by side with diffusers. `python -m benchmarks all` makes `benchmarks/results/`.

One file a question. Each has a TITLE, a docstring (what is asked, how it is measured, what to reach), `measure` and
`goals`; the report is made from these and from nothing else.
"""
