"""What a replacement is worth: tables, estimates, and what measured values say."""
