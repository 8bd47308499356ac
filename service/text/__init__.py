"""What the LLM reads, and the constraints on what it writes."""
