"""General capability: tasks of lm-evaluation-harness on a model in memory."""
