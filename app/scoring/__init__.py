"""How right answers are: metrics, intervals and calibration. No model, no server."""
