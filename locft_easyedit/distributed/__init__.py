"""Ranks of a launched job, and what they exchange."""
