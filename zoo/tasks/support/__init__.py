"""Code shared by several tasks: degradations, metrics, model checks, pictures."""
