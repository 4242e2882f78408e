"""Tests: a folder for each package of cnnrun, `system` for what crosses them, `support` for what tests share."""
