"""latentrt beside other engines, each in an environment of its own: `python -m benchmarks peers`.

`config.py` names models and peers, `environments.py` and `models.py` prepare them, `process.py` runs one peer,
`measure.py` is the run, `results.py` and `page.py` are its record. `scripts/` run in the peers' environments.
"""
