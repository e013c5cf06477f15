"""Products with the Hessian, its eigenvalues, and what they say about a point."""
