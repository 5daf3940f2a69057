"""Layer 6: pictures as data, thin over timm.data."""
