"""A page on this machine, whatever it shows: who may ask, how long a client may take, how it is stopped."""
