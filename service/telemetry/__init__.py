"""What operators and callers can see of the service: metrics, and traces of requests."""
