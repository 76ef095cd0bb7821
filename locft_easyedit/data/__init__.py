"""Requests, data sets and tokens: what is trained, before any model."""
