"""What an edit leaves as it is: texts, and what they send into the trained matrices."""
