"""A file a screen: from a state and its losses to plain values, computed with the library."""
