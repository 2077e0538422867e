"""The fused loss below its public functions: options, autograd, operators, the accumulator and its row-chunk loop."""
