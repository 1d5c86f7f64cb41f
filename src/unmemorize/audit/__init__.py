"""How much a model has memorized, and what a removal did: pure statistics, and one thin file a family."""
