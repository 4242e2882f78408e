"""Drawings: panels of images with boxes, contact sheets, tiles of tensors, plots as PNG, the network as SVG."""

__all__ = ["contact_sheet", "network_svg", "panels", "png", "tiles"]
