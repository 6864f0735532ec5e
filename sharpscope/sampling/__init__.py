"""Samples of the data: weighted draws that guide a solver, and what a sample says of the population."""

from sharpscope.sampling.sampling_error import sampling_error, sampling_of, trace_error

__all__ = ["sampling_error", "sampling_of", "trace_error"]
