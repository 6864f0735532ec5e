"""Reversible changes to a torch model: parameters as a vector, perturbations, restored state, replaced kernels."""
