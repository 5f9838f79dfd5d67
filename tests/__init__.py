"""A package, so that it comes before the ``tests`` that an installed one brings along (kronfluence 1.0 does)."""
