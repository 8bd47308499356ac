"""Measure each part of the relevance allocator on scenes that nothing was trained on."""
