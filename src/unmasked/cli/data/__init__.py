"""Verbs for training data, which need no model."""
