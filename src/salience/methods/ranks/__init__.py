"""Methods whose units are ranks: the rank-1 components that a weight matrix is a sum of."""
