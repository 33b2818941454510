"""What applying blocks comes to: the report, the faster way per layer, times of whole steps."""
