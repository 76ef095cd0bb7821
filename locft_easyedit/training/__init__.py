"""The breadth-first training loop and the session around it."""
