"""File formats of dictionaries: one module each, all safe to point at files from anywhere.

A reader turns a folder or file into an `ImportedSae` or refuses with a reason; a writer turns a
dictionary into files that the format's own library reads to the same function. `reading` tells
the formats apart, `writing` exports, `common` holds what several need.
"""
