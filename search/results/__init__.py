"""Results of a search as text, figures and pages."""
