"""`cnnrun init`: look at data of any kind, say how it is read and why, and write a config that suits it."""

__all__ = ["config_writer", "layouts", "reading"]
