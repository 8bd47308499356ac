"""Vertex AI's custom containers: its routes and its shape of predictions, in front of the same pipeline."""
