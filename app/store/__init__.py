"""The prompt store: strict files, importers, an append-only store on disk, caches in front of it."""
