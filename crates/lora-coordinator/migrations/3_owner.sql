-- Names this database: `objects/owner.json` says which database the files there belong to.
ALTER TABLE coordinator ADD COLUMN database_id TEXT NOT NULL DEFAULT '';
-- How often the store was opened, a file was taken in, or a job was submitted: the age of a copy of
-- the database.
ALTER TABLE coordinator ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
UPDATE coordinator SET database_id = lower(hex(randomblob(16)));

-- Files under `objects/` that have no row in `objects`.
CREATE TABLE unknown_objects (
    sha256 BLOB PRIMARY KEY CHECK (length(sha256) = 32),
    -- When this coordinator found the file.
    found  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
