"""Errors, files, locks, processes, devices, randomness, progress: nothing here knows of networks.

Every package may import from here. Imports nothing of cnnrun.
"""
