"""The axes of a policy loss, one file or folder each, with the pieces that may stand there."""
