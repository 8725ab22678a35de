"""The commands: one file each, with its options and a `run` that returns an exit code."""
