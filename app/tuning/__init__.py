"""Search over configuration keys with Ray Tune."""
