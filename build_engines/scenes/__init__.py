"""A small world of coloured shapes: sampled scenes, their pixels, and questions about them."""
