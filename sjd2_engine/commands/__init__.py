"""The commands of `sjd2` that have a file of their own, and the options that they share."""
