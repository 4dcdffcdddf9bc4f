"""The same work by other tools: one script each, run in an environment of its own by its benchmark."""
