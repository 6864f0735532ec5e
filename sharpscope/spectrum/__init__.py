"""Eigenvalues, density, trace and diagonal blocks of a problem's Hessian, or of another curvature matrix."""

from sharpscope.spectrum.density_and_trace import spectral_density, trace
from sharpscope.spectrum.eigenvalues import top_eigenvalues
from sharpscope.spectrum.layerwise import block_spectra

__all__ = ["block_spectra", "spectral_density", "top_eigenvalues", "trace"]
