"""Lossmith: policy learning for RLHF with a loss that is what its name says."""
