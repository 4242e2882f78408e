"""The command line. Each command reads its options, calls one function of another package and prints the result."""

__all__ = ["app"]
