"""Run the command line as `python -m cnnrun`."""

from cnnrun.commands.app import main

main()
