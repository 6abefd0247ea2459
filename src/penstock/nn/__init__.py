"""Tensors in, tensors out: kernels, layers, models, weights. Knows no request, no scheduler and no engine."""
