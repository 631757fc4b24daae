"""Tests of the model engine; a package, so that they share `tiny_models`."""
