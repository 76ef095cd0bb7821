"""What knows nothing of models and edits: files, parsing, hashes, tables."""
