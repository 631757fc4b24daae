-- Datasets that are read where they are, statistics that are computed once, and tokenizers that
-- belong to no model. `link` says where a dataset's documents are read each time; empty for those
-- that are stored in the folder. A linked dataset keeps only its first documents there, for a look.

ALTER TABLE datasets ADD COLUMN link TEXT NOT NULL DEFAULT '{}';
ALTER TABLE datasets ADD COLUMN statistics TEXT NOT NULL DEFAULT '{}';

CREATE TABLE tokenizers (
    id              INTEGER PRIMARY KEY,
    name            TEXT NOT NULL,
    source          TEXT NOT NULL CHECK (source IN ('local', 'hub')),
    origin          TEXT NOT NULL,
    folder          TEXT NOT NULL UNIQUE,
    tokenizer_hash  TEXT NOT NULL UNIQUE,
    vocab_size      INTEGER NOT NULL,
    provenance      TEXT NOT NULL DEFAULT '{}',
    created_at      TEXT NOT NULL
);
