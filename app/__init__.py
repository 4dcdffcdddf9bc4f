"""The nouns of Rayloop: shared modules, and one package a stage in the order data travels."""
