"""The commands that look for a placement."""
