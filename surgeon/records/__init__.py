"""What surgeon writes down: recipes and reports."""
