"""Files that people have, of every kind we read: found, opened safely, decoded, taken apart.

`listing` finds them, `opening` gives their bytes (unpacked, bounded), `encodings` their
characters; `lines`, `json_rows`, `csv_rows` and `arrow_rows` the rows, `rows` the documents.
"""
