"""`promptplex train`: what answers while a prompt is trained, what is shown, what is written and pushed."""
