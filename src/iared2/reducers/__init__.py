"""Layer 4: reducers, which shorten a pack before a block or in the middle of it."""
