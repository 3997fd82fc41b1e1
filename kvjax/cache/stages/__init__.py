"""The stages of chains: `windows` has the plain ones, `store` the one that codes."""
