"""What an edit will take - memory, work, time - told from a model's `config.json` alone."""
