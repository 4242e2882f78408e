"""The command line: options, one call into the packages below, printing."""
