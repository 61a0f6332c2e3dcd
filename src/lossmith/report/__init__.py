"""What people look at: a loss (`loss/`), its proofs (`audit/`), a run (`run/`)."""
