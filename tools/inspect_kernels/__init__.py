"""Compile the Triton kernels of a training step for several GPUs, without one, and list what each compiled kernel uses.

`compiling` compiles launches and reads what the compiled kernels use; `checks` says what is refused and models time;
`report` writes both as markdown; `python -m tools.inspect_kernels` is the command.
"""
