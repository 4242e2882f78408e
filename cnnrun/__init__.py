"""cnnrun trains convolutional networks that are described in YAML."""

__version__ = "0.1.0"
