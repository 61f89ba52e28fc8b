"""Pruned and approximated forwards: context managers that change what a model computes, by hooks alone."""
