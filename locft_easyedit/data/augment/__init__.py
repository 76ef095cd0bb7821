"""Rewordings of the edits' own prompts, made by rule and template, to train with."""
