"""How a fault changes the stock model: what is found in it, and what is exchanged for the length of a `with` block."""
