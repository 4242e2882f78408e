"""`python -m cnnrun`."""

from cnnrun.cli import main

main()
