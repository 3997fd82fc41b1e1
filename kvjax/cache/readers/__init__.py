"""Which stored tokens a query reads at a step: `reader` has the interface and the plain ones."""
