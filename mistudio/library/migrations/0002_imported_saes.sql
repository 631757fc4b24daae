-- Dictionaries that others trained, and dictionaries that reconstruct another point than they read.
-- `name` is empty for those of a run, which has one; `provenance` says where an imported one is from.

ALTER TABLE saes ADD COLUMN name TEXT NOT NULL DEFAULT '';
ALTER TABLE saes ADD COLUMN source TEXT NOT NULL DEFAULT 'trained'
    CHECK (source IN ('trained', 'imported'));
ALTER TABLE saes ADD COLUMN wiring TEXT NOT NULL DEFAULT 'sae';
ALTER TABLE saes ADD COLUMN hook_point_out TEXT NOT NULL DEFAULT '';
ALTER TABLE saes ADD COLUMN provenance TEXT NOT NULL DEFAULT '{}';

UPDATE saes SET hook_point_out = hook_point;
