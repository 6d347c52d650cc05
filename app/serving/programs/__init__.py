"""What a task does with the model: complete, or classify."""
