"""What a sample, a head and a loss are."""
