"""A table version to a model version, with DeepSpeed under Ray Train."""
