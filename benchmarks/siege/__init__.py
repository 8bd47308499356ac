"""Every kind of hostile connection at once, beside honest clients: python -m benchmarks.siege."""
