"""What a run shows for itself: `metrics.json` for programs, `report.html` for people."""
