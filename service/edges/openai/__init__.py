"""Serve clients of OpenAI's API: its words to ours, and back. What HTTP edges share is in service.edges.http."""
