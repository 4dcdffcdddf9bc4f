"""Sources to a checked, versioned table of conversations."""
