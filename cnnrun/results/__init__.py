"""Uses of trained networks: predictions, comparison, calibration, people, the report, studies.

Each module does the work of one command. It may import `explain`, `export` and the packages below them.
"""

__all__ = ["calibrate", "compare", "evaluate", "export_run", "people", "predict", "report", "studies"]
