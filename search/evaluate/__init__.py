"""Values of placements: from tables, short trainings, and full trainings."""
