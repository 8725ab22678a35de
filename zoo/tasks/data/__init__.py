"""Data of the tasks: reading, checks, random draws, transforms, fingerprints."""
