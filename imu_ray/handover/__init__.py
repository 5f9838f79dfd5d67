"""What is done with finished runs: exported, signed and verified records, and runs side by side."""
