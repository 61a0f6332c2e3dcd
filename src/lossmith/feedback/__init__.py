"""Human feedback: output sets, judgements of them, and the preferences that a loss can read."""
