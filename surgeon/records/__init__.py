"""Recipes and reports, surgeon's written records."""
