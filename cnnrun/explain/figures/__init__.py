"""Pictures of what a network sees: panels, contact sheets, tiles, the network as SVG."""
