"""Expected gains of replacements: tables, estimators, and updates from measured values."""
