"""Placements under budgets, by integer programming or at random."""
