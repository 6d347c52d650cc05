"""What every request passes: limits, log, headers, tracing."""
