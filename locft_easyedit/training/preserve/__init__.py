"""What an edit is to leave as it is: directions of inputs and outputs, measured and kept."""
