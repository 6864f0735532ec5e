"""Samples of the data: random subsets, importance samples that guide a solver, and sampling errors."""

from sharpscope.sampling.sampling_error import sampling_error, sampling_error_of_batches, trace_error

__all__ = ["sampling_error", "sampling_error_of_batches", "trace_error"]
