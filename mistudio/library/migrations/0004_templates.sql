-- Named configurations: of trainings, of extractions, of steering. `config` is plain data; models
-- and datasets are named in it by what they are (Hub id, revision), not by a number of this library.

CREATE TABLE templates (
    id           INTEGER PRIMARY KEY,
    kind         TEXT NOT NULL CHECK (kind IN ('training', 'extraction', 'steering')),
    name         TEXT NOT NULL,
    description  TEXT NOT NULL DEFAULT '',
    favourite    INTEGER NOT NULL DEFAULT 0,
    config       TEXT NOT NULL,
    created_at   TEXT NOT NULL,
    updated_at   TEXT NOT NULL,
    UNIQUE (kind, name)
);

-- Those that every library begins with; deleted ones stay deleted.
INSERT INTO templates (kind, name, description, favourite, config, created_at, updated_at) VALUES
('training', 'Large Expansion',
 'Very sparse with 16x expansion for detailed feature discovery',
 0, '{"model": {}, "dataset": {}, "layers": [10], "site": "resid_post", "source": "auto", "hyperparameters": {"steps": 20000, "batch_size": 512, "expansion": 16, "k": 16, "learning_rate": 0.0001, "optimizer": "adamw", "schedule": "linear"}}',
 '2026-01-01T00:00:00+00:00', '2026-01-01T00:00:00+00:00'),
('training', 'High Quality SAE',
 'Production-quality sparse autoencoder with cosine schedule',
 1, '{"model": {}, "dataset": {}, "layers": [6, 12, 18], "site": "resid_post", "source": "auto", "hyperparameters": {"steps": 10000, "batch_size": 256, "expansion": 8, "learning_rate": 0.0001, "optimizer": "adamw", "schedule": "cosine"}}',
 '2026-01-01T00:00:00+00:00', '2026-01-01T00:00:00+00:00'),
('training', 'Fast Prototyping',
 'Quick training with small expansion factor for rapid iteration',
 1, '{"model": {}, "dataset": {}, "layers": [6], "site": "resid_post", "source": "auto", "hyperparameters": {"steps": 5000, "batch_size": 128, "expansion": 4, "learning_rate": 0.0005, "optimizer": "adamw", "schedule": "constant", "auxk": false, "revive": false}}',
 '2026-01-01T00:00:00+00:00', '2026-01-01T00:00:00+00:00'),
('training', '5-minute classroom',
 'A small dictionary of one layer, trained within five minutes on a laptop',
 1, '{"model": {}, "dataset": {}, "layers": [], "site": "resid_post", "source": "auto", "hyperparameters": {"tokens": 500000, "expansion": 4, "k": 32}}',
 '2026-01-01T00:00:00+00:00', '2026-01-01T00:00:00+00:00'),
('extraction', 'Full Analysis',
 'Twelve layers, residual stream, MLP and attention, all text',
 0, '{"model": {}, "dataset": {}, "layers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], "sites": ["resid_post", "mlp_out", "attn_out"]}',
 '2026-01-01T00:00:00+00:00', '2026-01-01T00:00:00+00:00'),
('extraction', 'Quick Scan',
 'First, middle and late layers, residual stream',
 1, '{"model": {}, "dataset": {}, "layers": [0, 6, 11], "sites": ["resid_post"], "max_documents": 5000}',
 '2026-01-01T00:00:00+00:00', '2026-01-01T00:00:00+00:00');
