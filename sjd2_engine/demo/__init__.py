"""A page on which decoders race each other."""
