"""Rules among the rows of a prompt, for `attending` (`kvjax.cache.rule` has the interface)."""
