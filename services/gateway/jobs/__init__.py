"""What a job is, and the one table that says what became of it."""
