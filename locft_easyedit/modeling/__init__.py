"""The model: loading it, finding places in it, running parts of it."""
