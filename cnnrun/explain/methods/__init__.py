"""Methods of looking into a network, one a file."""
