"""Layer 7: what a person looks at: pictures, a page, and the manifest that says where they come from."""
