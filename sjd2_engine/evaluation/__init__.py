"""Measuring: the comparison of decoders, the pictures' scores, and how both are written down."""
