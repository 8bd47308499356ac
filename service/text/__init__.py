"""What the LLM reads, and the form in which it must answer."""
