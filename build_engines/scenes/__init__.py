"""A small world of coloured shapes: what may be in a scene, how it looks, and what can be asked about it."""
