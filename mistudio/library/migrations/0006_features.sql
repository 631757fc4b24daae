-- What the user does with features beside a label, a note and a star: hiding, several labels with
-- where each is from, lists, saved views of the table, scores by other means than the rule, and
-- results of analyses that cost forward passes.

ALTER TABLE feature_notes ADD COLUMN hidden INTEGER NOT NULL DEFAULT 0;

CREATE TABLE feature_labels (
    id          INTEGER PRIMARY KEY,
    sae_id      INTEGER NOT NULL REFERENCES saes(id) ON DELETE CASCADE,
    feature     INTEGER NOT NULL,
    text        TEXT NOT NULL,
    source      TEXT NOT NULL CHECK (source IN ('human', 'rule', 'model', 'imported')),
    origin      TEXT NOT NULL DEFAULT '',
    score       REAL,
    low         REAL,
    high        REAL,
    details     TEXT NOT NULL DEFAULT '{}',
    created_at  TEXT NOT NULL,
    UNIQUE (sae_id, feature, source, origin, text)
);

INSERT INTO feature_labels (sae_id, feature, text, source, created_at)
SELECT sae_id, feature, label, 'human', strftime('%Y-%m-%dT%H:%M:%S+00:00', 'now')
FROM feature_notes WHERE label <> '';

CREATE TABLE feature_lists (
    id           INTEGER PRIMARY KEY,
    name         TEXT NOT NULL UNIQUE,
    description  TEXT NOT NULL DEFAULT '',
    created_at   TEXT NOT NULL
);

CREATE TABLE feature_list_items (
    list_id  INTEGER NOT NULL REFERENCES feature_lists(id) ON DELETE CASCADE,
    sae_id   INTEGER NOT NULL REFERENCES saes(id) ON DELETE CASCADE,
    feature  INTEGER NOT NULL,
    PRIMARY KEY (list_id, sae_id, feature)
) WITHOUT ROWID;

CREATE TABLE feature_views (
    id          INTEGER PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    query       TEXT NOT NULL,
    created_at  TEXT NOT NULL
);

CREATE TABLE feature_scores (
    sae_id      INTEGER NOT NULL REFERENCES saes(id) ON DELETE CASCADE,
    feature     INTEGER NOT NULL,
    scorer      TEXT NOT NULL CHECK (scorer IN ('embedding', 'model', 'human')),
    accuracy    REAL NOT NULL,
    low         REAL,
    high        REAL,
    active      INTEGER NOT NULL,
    inactive    INTEGER NOT NULL,
    details     TEXT NOT NULL DEFAULT '{}',
    created_at  TEXT NOT NULL,
    PRIMARY KEY (sae_id, feature, scorer)
) WITHOUT ROWID;

CREATE TABLE feature_analyses (
    feature_run_id  INTEGER NOT NULL REFERENCES feature_runs(id) ON DELETE CASCADE,
    feature         INTEGER NOT NULL,
    kind            TEXT NOT NULL,
    params          TEXT NOT NULL,
    result          TEXT NOT NULL,
    created_at      TEXT NOT NULL,
    PRIMARY KEY (feature_run_id, feature, kind, params)
) WITHOUT ROWID;
