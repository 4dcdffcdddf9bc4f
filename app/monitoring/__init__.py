"""Traffic and feedback to figures, reports and metrics."""
