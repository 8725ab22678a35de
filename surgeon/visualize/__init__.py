"""Pictures and measurements of what varies in a model: captured with hooks, measured, drawn."""
