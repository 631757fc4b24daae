"""Exports of features that others read: tables, Neuronpedia's formats, a page to look at.

`material.Material` is what they all read, one feature after the other; `writing.appearing` makes
files and folders that are whole or not there. Schemas of what is JSON lie in `schemas/`.
"""
