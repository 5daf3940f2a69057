"""Layer 4: reducers, which shorten a pack before a block."""
