"""Fit how sure a repository's models are of their answers, and write it into the model card."""
