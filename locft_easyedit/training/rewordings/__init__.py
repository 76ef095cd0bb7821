"""Rewordings of the edits' prompts that a language model writes (`augment_model`)."""
