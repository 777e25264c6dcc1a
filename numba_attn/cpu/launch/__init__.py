"""From a `Problem` to a call of a CPU kernel, one module for each pass; record.py is what they share."""
