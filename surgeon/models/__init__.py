"""Models by name or folder, their weights, and the name of a given model."""
