"""API keys: what they are and may do, the file that holds their hashes, and how much each has used."""
