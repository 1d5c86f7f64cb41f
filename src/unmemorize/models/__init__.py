"""Which neurons a model has: one file a family, one table row an architecture."""
