"""What was forgotten, what was kept, and the report."""
