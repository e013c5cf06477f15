"""Products with the Hessian, its eigenvalues, and the kind of a point that they indicate."""
