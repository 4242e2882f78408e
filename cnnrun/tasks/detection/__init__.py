"""Boxes with labels: head, assignment, losses, average precision."""
