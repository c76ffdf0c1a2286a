-- The number of checkpoints of the write-ahead log that the coordinator started, and the value of
-- this counter that the database's file is known to have without the log. `objects/owner.json` has
-- a copy of the second one. If the first one in the file is lower than that, the file is an older
-- copy, and a log beside it was written for another file.
ALTER TABLE coordinator ADD COLUMN wal_checkpoints_started INTEGER NOT NULL DEFAULT 0;
ALTER TABLE coordinator ADD COLUMN wal_checkpoints_completed INTEGER NOT NULL DEFAULT 0;
