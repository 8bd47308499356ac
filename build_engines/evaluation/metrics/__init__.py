"""The metrics of the field's benchmarks, written from their published descriptions."""
