"""Model loading and decoding: requests in, answers out. Knows no ray and no table."""
