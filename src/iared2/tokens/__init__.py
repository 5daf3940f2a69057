"""Layer 1: packed tokens, the grid they come from, and attention among them."""
