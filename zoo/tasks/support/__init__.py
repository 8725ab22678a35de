"""What several tasks share: finding and reading files, random draws, degradations, metrics, pictures."""
