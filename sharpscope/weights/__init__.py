"""What is done to a torch model while it is measured, and undone: parameters as a vector, perturbations, kernels."""
