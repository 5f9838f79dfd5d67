"""The weighted ascent on the head, torch only."""
