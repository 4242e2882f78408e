"""Numbers and angles: losses, decoders, residuals."""
