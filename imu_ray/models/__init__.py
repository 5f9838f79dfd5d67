"""A model from a spec, its checkpoint, and its layers."""
