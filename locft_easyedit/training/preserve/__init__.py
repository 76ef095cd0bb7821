"""What an edit is to leave as it is: measured as directions of a matrix's inputs, and kept."""
