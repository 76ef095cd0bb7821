"""Metrics: EasyEdit's teacher-forced ones, the generated ones of the paper, and fluency."""
