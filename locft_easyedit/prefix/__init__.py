"""The frozen prefix: hidden states below the first trained matrix, recorded once."""
