"""Mutated images and bodies, sent to a real gateway: python -m benchmarks.fuzz."""
