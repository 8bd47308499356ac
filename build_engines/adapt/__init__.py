"""Give a checkpoint an allocator of its own, from images and questions, with or without answers."""
