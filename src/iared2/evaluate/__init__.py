"""Layer 5: figures about a reduced model, with the dense one measured beside it."""
