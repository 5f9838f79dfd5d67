"""Many runs at a time."""
