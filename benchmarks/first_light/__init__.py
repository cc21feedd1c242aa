"""What a few minutes on a real GPU must decide: kernels right or wrong, speed beside others, resuming, and what follows.

`python -m benchmarks.first_light --help` says how to run it; `steps` has what it does, in order of value.
"""
