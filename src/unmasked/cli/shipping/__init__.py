"""Verbs for putting a model to use elsewhere: serve, export, merge, and checks of the vectors."""
