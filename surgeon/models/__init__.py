"""Models by name or folder, their weights, and the identification of a given model."""
