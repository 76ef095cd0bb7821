"""What tests share: toys, references, launched processes."""
