"""Implementation of the fused loss: options, autograd, operators, the accumulator and the native call."""
