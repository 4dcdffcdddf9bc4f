"""A model version behind an OpenAI-compatible API on Ray Serve."""
