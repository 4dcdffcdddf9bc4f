"""A model version to a smaller one, or a refusal with its figures."""
