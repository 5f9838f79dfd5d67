"""The only folder that runs things on Ray."""
