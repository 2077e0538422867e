"""Implementation of the fused loss: options, autograd, operators, the accumulator and its row-chunk loop."""
