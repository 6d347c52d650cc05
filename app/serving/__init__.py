"""Task and text in, text out: everything between the HTTP edge and the engine's token ids."""
