"""What is known of one request while it runs, and how it ended."""
