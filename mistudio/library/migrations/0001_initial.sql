-- What the user owns. A row that names a folder names a complete one: files are renamed into
-- place before the row is committed. Folders are relative to the library's own folder.

CREATE TABLE datasets (
    id          INTEGER PRIMARY KEY,
    name        TEXT NOT NULL,
    source      TEXT NOT NULL CHECK (source IN ('sample', 'local', 'hub')),
    origin      TEXT NOT NULL,
    folder      TEXT NOT NULL UNIQUE,
    documents   INTEGER NOT NULL,
    characters  INTEGER NOT NULL,
    bytes       INTEGER NOT NULL,
    provenance  TEXT NOT NULL DEFAULT '{}',
    created_at  TEXT NOT NULL
);

CREATE TABLE models (
    id          INTEGER PRIMARY KEY,
    name        TEXT NOT NULL,
    source      TEXT NOT NULL CHECK (source IN ('sample', 'local', 'hub')),
    origin      TEXT NOT NULL,
    folder      TEXT NOT NULL UNIQUE,
    precision   TEXT NOT NULL DEFAULT 'auto',
    n_layers    INTEGER NOT NULL,
    d_model     INTEGER NOT NULL,
    parameters  INTEGER NOT NULL,
    bytes       INTEGER NOT NULL,
    summary     TEXT NOT NULL DEFAULT '{}',
    provenance  TEXT NOT NULL DEFAULT '{}',
    created_at  TEXT NOT NULL
);

CREATE TABLE tokenizations (
    id              INTEGER PRIMARY KEY,
    dataset_id      INTEGER NOT NULL REFERENCES datasets(id),
    tokenizer_hash  TEXT NOT NULL,
    settings        TEXT NOT NULL DEFAULT '{}',
    folder          TEXT NOT NULL UNIQUE,
    tokens          INTEGER NOT NULL,
    statistics      TEXT NOT NULL DEFAULT '{}',
    created_at      TEXT NOT NULL,
    UNIQUE (dataset_id, tokenizer_hash, settings)
);

CREATE TABLE extractions (
    id               INTEGER PRIMARY KEY,
    model_id         INTEGER NOT NULL REFERENCES models(id),
    tokenization_id  INTEGER NOT NULL REFERENCES tokenizations(id),
    hook_points      TEXT NOT NULL,
    settings         TEXT NOT NULL DEFAULT '{}',
    folder           TEXT NOT NULL UNIQUE,
    tokens           INTEGER NOT NULL,
    bytes            INTEGER NOT NULL,
    statistics       TEXT NOT NULL DEFAULT '{}',
    created_at       TEXT NOT NULL
);

CREATE TABLE trainings (
    id               INTEGER PRIMARY KEY,
    name             TEXT NOT NULL,
    model_id         INTEGER NOT NULL REFERENCES models(id),
    dataset_id       INTEGER NOT NULL REFERENCES datasets(id),
    tokenization_id  INTEGER NOT NULL REFERENCES tokenizations(id),
    extraction_id    INTEGER REFERENCES extractions(id),
    job_id           INTEGER REFERENCES jobs(id),
    status           TEXT NOT NULL CHECK (status IN ('completed', 'stopped')),
    config           TEXT NOT NULL,
    record           TEXT NOT NULL DEFAULT '{}',
    folder           TEXT NOT NULL UNIQUE,
    seconds          REAL NOT NULL,
    created_at       TEXT NOT NULL
);

CREATE TABLE saes (
    id           INTEGER PRIMARY KEY,
    training_id  INTEGER REFERENCES trainings(id) ON DELETE CASCADE,
    model_id     INTEGER NOT NULL REFERENCES models(id),
    hook_point   TEXT NOT NULL,
    layer        INTEGER NOT NULL,
    folder       TEXT NOT NULL UNIQUE,
    architecture TEXT NOT NULL,
    d_in         INTEGER NOT NULL,
    d_sae        INTEGER NOT NULL,
    k            REAL NOT NULL,
    metrics      TEXT NOT NULL DEFAULT '{}',
    created_at   TEXT NOT NULL
);

CREATE TABLE feature_runs (
    id               INTEGER PRIMARY KEY,
    sae_id           INTEGER NOT NULL REFERENCES saes(id) ON DELETE CASCADE,
    tokenization_id  INTEGER NOT NULL REFERENCES tokenizations(id),
    folder           TEXT NOT NULL UNIQUE,
    n_features       INTEGER NOT NULL,
    tokens           INTEGER NOT NULL,
    summary          TEXT NOT NULL DEFAULT '{}',
    created_at       TEXT NOT NULL
);

-- Only features that the user touched have a row.
CREATE TABLE feature_notes (
    sae_id   INTEGER NOT NULL REFERENCES saes(id) ON DELETE CASCADE,
    feature  INTEGER NOT NULL,
    label    TEXT NOT NULL DEFAULT '',
    note     TEXT NOT NULL DEFAULT '',
    starred  INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (sae_id, feature)
) WITHOUT ROWID;

CREATE TABLE generations (
    id          INTEGER PRIMARY KEY,
    sae_id      INTEGER NOT NULL REFERENCES saes(id) ON DELETE CASCADE,
    request     TEXT NOT NULL,
    result      TEXT NOT NULL,
    created_at  TEXT NOT NULL
);

CREATE TABLE jobs (
    id            INTEGER PRIMARY KEY,
    kind          TEXT NOT NULL,
    title         TEXT NOT NULL,
    lane          TEXT NOT NULL CHECK (lane IN ('compute', 'disk')),
    params        TEXT NOT NULL DEFAULT '{}',
    status        TEXT NOT NULL CHECK (status IN ('queued', 'running', 'paused', 'finished',
                                                  'failed', 'cancelled', 'interrupted')),
    phase         TEXT NOT NULL DEFAULT '',
    fraction      REAL NOT NULL DEFAULT 0,
    result        TEXT NOT NULL DEFAULT '{}',
    error         TEXT NOT NULL DEFAULT '{}',
    owner         TEXT NOT NULL DEFAULT '',
    created_at    TEXT NOT NULL,
    started_at    TEXT,
    ended_at      TEXT
);

CREATE INDEX jobs_by_status ON jobs(status);
CREATE INDEX saes_by_training ON saes(training_id);
CREATE INDEX feature_runs_by_sae ON feature_runs(sae_id);
CREATE INDEX generations_by_sae ON generations(sae_id);
