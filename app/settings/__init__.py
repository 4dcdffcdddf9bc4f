"""The sections of the configuration tree that are too large to stand in `app/config.py`."""
