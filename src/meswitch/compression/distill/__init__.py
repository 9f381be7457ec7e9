"""Training a compressed expert against the full one: end to end, or block by block."""
