-- How strongly single features can be steered, as measured (`curve`: every strength that was tried),
-- and experiments: sweeps, prompt lists, layer studies. Both hold plain data.

CREATE TABLE feature_calibrations (
    sae_id       INTEGER NOT NULL REFERENCES saes(id) ON DELETE CASCADE,
    feature      INTEGER NOT NULL,
    method       TEXT NOT NULL,
    site         TEXT NOT NULL,
    recommended  REAL NOT NULL,
    s_max        REAL,
    curve        TEXT NOT NULL,
    created_at   TEXT NOT NULL,
    PRIMARY KEY (sae_id, feature, method)
) WITHOUT ROWID;

CREATE TABLE experiments (
    id          INTEGER PRIMARY KEY,
    name        TEXT NOT NULL,
    kind        TEXT NOT NULL,
    request     TEXT NOT NULL,
    result      TEXT NOT NULL,
    created_at  TEXT NOT NULL
);
