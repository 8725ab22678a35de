"""Data of the tasks: read, checked, drawn, transformed, fingerprinted."""
