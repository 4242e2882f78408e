"""What knows nothing of networks: errors, files, locks, processes, devices, randomness, progress.

Every package may import from here. Imports nothing of cnnrun.
"""
