"""Replace convolutions by dynamic layers, verify the result, and revert it."""
