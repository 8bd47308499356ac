"""Measure answers in a form: whether each parses, and what other answers lose beside them."""
