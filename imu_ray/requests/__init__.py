"""Deletion requests: a queue of files, and the lineage of models that come of it, one after the other."""
