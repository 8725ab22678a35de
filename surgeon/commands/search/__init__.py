"""The commands of the placement search."""
