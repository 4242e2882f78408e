"""Uses of trained networks: predictions, comparison, calibration, people, the report, studies.

Each module has what one command does. Imports `explain`, `export` and what is below.
"""
