"""Localize: which neurons of a trained model hold what it memorized."""
