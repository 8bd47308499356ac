"""What each part of the relevance allocator is worth, measured on scenes that nothing was trained on."""
