"""The report: an HTML page about one run, or about several side by side."""

__all__ = ["class_tables", "writer"]
