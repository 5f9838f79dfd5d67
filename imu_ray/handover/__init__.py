"""What is handed on of a run: an export of its record, a signature, and whether both are still what was written."""
