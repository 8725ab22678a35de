"""A search in text, figures and pages."""
