"""Parts of a decoder layer: pure functions of weights, hidden rows and caches."""
