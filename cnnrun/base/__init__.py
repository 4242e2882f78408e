"""Errors, files, locks, processes, devices, random numbers and progress; nothing here is about networks.

Every package may import this one. It imports nothing else of cnnrun.
"""
