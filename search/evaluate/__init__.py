"""What a placement's value is: from tables, by short trainings, by full ones."""
