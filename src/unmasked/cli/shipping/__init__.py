"""Verbs for a model that leaves the house: exports, checks of other people's servers and models."""
