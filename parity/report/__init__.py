"""A Comparison as something to read: terminal and JSON. Nothing here sees more than the Comparison."""
