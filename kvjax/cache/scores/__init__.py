"""How much a token is worth keeping: `score` has the interface and the plain ones."""
