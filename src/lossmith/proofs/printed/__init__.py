"""What a printed formula means: its text read as a program and run on a batch."""
