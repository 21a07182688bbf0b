"""A Comparison as something to read: terminal, HTML, Markdown, pictures and JSON. Nothing here sees more than it."""
