"""Operators of PsPG: tensors in, tensors out. Imports torch and triton, nothing of the engine."""
