"""Results: written and read again, with their summaries and figures."""
