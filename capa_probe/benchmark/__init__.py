"""Runs a model to compare: the confirmation of the findings, with intervals and paired tests."""
