"""Shared by the commands: their options, early checks, output, and the task of a run."""
