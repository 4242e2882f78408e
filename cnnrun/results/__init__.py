"""Uses of trained networks: predictions, comparison, calibration, people, the report, studies.

`operations` has what the plain commands do. Imports `explain`, `export` and what is below.
"""
