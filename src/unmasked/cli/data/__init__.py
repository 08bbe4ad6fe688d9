"""Verbs for training data: `data check`, which needs no model unless it is asked to use one."""
