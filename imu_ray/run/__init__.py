"""What a run leaves behind: its directory, its record, and where both are stored."""
