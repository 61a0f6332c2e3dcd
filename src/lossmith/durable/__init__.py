"""What makes long work impossible to lose: signals that wait, states on disk that are whole, inputs that are known."""
