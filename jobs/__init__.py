"""The verbs of Rayloop: one stage each, submitted with `ray job submit`."""
