"""A model of a training step on a GPU, made without one: nothing here is measured.

The step that `benchmarks.step` times, Triton form and bf16, or one of phase 1, runs on tensors without storage. Every
operator and kernel launch of it is logged (`trace.py`), counted, and priced (`price.py`) by a table of assumptions
(`assumptions.py`) that measured numbers replace: `python -m benchmarks.model --calibration FILE`.
"""
